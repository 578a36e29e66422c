"""The one reader of picture files: what a file shows, as RGB, or an error that names it.

Shapes: pixels [3, H, W] in [0, 1].
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import functional as vision

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Pictures that PIL opens only with plug-ins: a folder that holds some must not be read as if it did not.
UNREADABLE_SUFFIXES = (
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".jp2",
    ".exr",
    ".hdr",
    ".psd",
    ".svg",
    ".dng",
    ".cr2",
    ".nef",
)
# PIL warns above a third of this and then decodes; a file of a few kB can claim any size.
MOST_PIXELS = 268_435_456
# Files that are looked into before a run, and the bytes up to which they are decoded for it.
MOST_VERIFIED, MOST_DECODED = 2_000, 1_000_000
# Files of several pictures that are one picture with a preview beside it.
MULTI_PICTURE = ("MPO",)


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as 8-bit RGB, as a viewer would show it.

    16-bit and 32-bit grey are scaled by their range, grey of floats is read as [0, 1], the camera's orientation is
    applied, and transparent pictures are laid on white.

    Raises:
        ValueError: the file is no whole picture, is an animation, has more pixels than `MOST_PIXELS`, or holds grey
            values outside the range of their kind.
    """
    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format not in MULTI_PICTURE:
                raise ValueError(f"{path} holds {frames} pictures; a picture file has one: read it as video")
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(
                    f"{path} claims {picture.width} x {picture.height} pixels, at most {MOST_PIXELS} are read"
                )
            return as_rgb(picture, name=str(path))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no whole picture that PIL can read: {error}") from error


def require_readable(paths: Sequence[Path]) -> None:
    """Look into picture files before slow work rests on them; of more than `MOST_VERIFIED` into as many, evenly spread.

    Raises ValueError that names the first that is no whole picture file. Of large files the beginning is read alone.
    """
    for path in paths[:: -(-len(paths) // MOST_VERIFIED) or 1]:
        if path.suffix.lower() not in PICTURE_SUFFIXES or not path.is_file():
            raise ValueError(f"{path} is no picture file; read are {', '.join(PICTURE_SUFFIXES)}")
        try:
            with Image.open(path) as picture:
                picture.verify()
            # What ends early has a sound beginning in some formats.
            if path.stat().st_size <= MOST_DECODED:
                with Image.open(path) as picture:
                    picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is no whole picture that PIL can read: {error}") from error


def as_rgb(picture: Image.Image, *, name: str) -> Image.Image:
    """One frame as 8-bit RGB; `name` stands in errors. Raises ValueError for grey values outside their range."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        return _scaled_grey(upright, name=name).convert("RGB")
    if "A" in upright.getbands() or "a" in upright.getbands() or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        # Pixels that nobody sees may hold any colour.
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return upright.convert("RGB")


def _scaled_grey(picture: Image.Image, *, name: str) -> Image.Image:
    """Grey of more than 8 bits as 8-bit grey: PIL's own conversion cuts at 255."""
    values = np.asarray(picture).astype(np.float64)
    top = 1.0 if picture.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > top:
        raise ValueError(
            f"{name} holds grey values from {values.min():.6g} to {values.max():.6g}; of kind {picture.mode} those "
            f"from 0 to {top:g} are read: scale it"
        )
    return Image.fromarray(np.round(values * (255.0 / top)).astype(np.uint8))


def read_picture(path: str | Path, height: int, width: int) -> Tensor:
    """One picture as [3, height, width] in [0, 1]. Raises ValueError as `open_picture`."""
    return fit_picture(open_picture(path), height, width)


def fit_picture(picture: Image.Image, height: int, width: int) -> Tensor:
    """An RGB picture as [3, height, width] in [0, 1]: resized to cover that size, then cut to its centre."""
    scale = max(height / picture.height, width / picture.width)
    size = [max(height, round(picture.height * scale)), max(width, round(picture.width * scale))]
    # torchvision annotates these functions for tensors alone; a picture stays a picture in them.
    lanczos = vision.InterpolationMode.LANCZOS
    resized = vision.resize(picture, size, lanczos)  # pyright: ignore[reportArgumentType]
    return vision.to_tensor(vision.center_crop(resized, [height, width]))  # pyright: ignore[reportArgumentType]


def natural_order(path: str | Path) -> list[tuple[int, str]]:
    """A key that sorts names as people count: frame2 before frame10."""
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", str(path)) if part]


def find_pictures(folder: str | Path) -> list[Path]:
    """All picture files of a folder and of the folders in it, in natural order; hidden ones are left out.

    Raises:
        ValueError: there is no such folder, it holds no picture, or it holds one of a kind that cannot be read.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"there is no directory {place}; give a folder of pictures")
    found: list[Path] = []
    seen = {os.path.realpath(place)}
    for parent, folders, names in os.walk(place, followlinks=True):
        # A link to a folder above would come again and again.
        ways = {name: os.path.realpath(os.path.join(parent, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, way in ways.items() if way not in seen]
        seen |= set(ways.values())
        for name in names:
            suffix = Path(name).suffix.lower()
            # Copies from other systems bring files such as ._name.png, which are no pictures.
            if name.startswith("."):
                continue
            if suffix in UNREADABLE_SUFFIXES:
                raise ValueError(
                    f"{Path(parent, name)} is a {suffix} picture, which is not read; write it as one of "
                    f"{', '.join(PICTURE_SUFFIXES)}"
                )
            if suffix in PICTURE_SUFFIXES:
                found.append(Path(parent, name))
    if not found:
        raise ValueError(f"{place} holds 0 pictures ({', '.join(PICTURE_SUFFIXES)})")
    return sorted(found, key=lambda path: natural_order(path.relative_to(place)))
