"""The one reader and the one writer of videos: folders of numbered pictures, animations, and files such as mp4.

Files other than animations go through imageio-ffmpeg, an extra of this package (`video`).

Shapes: videos [3, F, H, W] in [0, 1], frames uint8 [H, W, 3].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from fewstep.core.media.pictures import as_rgb, find_pictures, fit_picture, open_picture

FILM_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v")
ANIMATION_SUFFIXES = (".gif", ".png", ".webp", ".apng")
VIDEO_SUFFIXES = (*FILM_SUFFIXES, *ANIMATION_SUFFIXES)
NEEDS_FFMPEG = "needs imageio-ffmpeg: pip install imageio-ffmpeg"


def require_ffmpeg(path: str | Path) -> None:
    """Raise ValueError when imageio-ffmpeg, which `path` needs, is not installed."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"{path} {NEEDS_FFMPEG}; folders of pictures and .gif do without")


def read_video(path: str | Path, *, frames: int, height: int, width: int, every: int = 1) -> Tensor:
    """The first `frames` frames [3, frames, height, width] in [0, 1], one of `every`, resized and cut to the centre.

    Raises:
        ValueError: the video is not readable or too short, or frames or every is below 1.
    """
    if frames < 1 or every < 1:
        raise ValueError(f"frames is {frames} and every {every}; use at least 1")
    taken = []
    for number, picture in enumerate(iterate_frames(path)):
        if number % every == 0:
            taken.append(fit_picture(picture, height, width))
            if len(taken) == frames:
                return torch.stack(taken, dim=1)
    needed = (frames - 1) * every + 1
    found = sum(1 for _ in iterate_frames(path))
    raise ValueError(f"{path} has {found} frames; {frames} frames, one of {every}, need {needed}")


def iterate_frames(path: str | Path) -> Iterator[Image.Image]:
    """The frames of a video as RGB pictures, one after the other. Raises ValueError when it cannot be read."""
    place = Path(path)
    if place.is_dir():
        for file in find_pictures(place):
            yield open_picture(file)
    elif place.suffix.lower() in FILM_SUFFIXES:
        yield from _film_frames(place)
    else:
        try:
            with Image.open(place) as animation:
                for number, picture in enumerate(ImageSequence.Iterator(animation)):
                    yield as_rgb(picture, name=f"frame {number} of {place}")
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"{place} is no animation that PIL can read ({error}); give a folder of frames, an animation, or a "
                f"file that ends in one of {', '.join(FILM_SUFFIXES)}"
            ) from error


def _film_frames(path: Path) -> Iterator[Image.Image]:
    require_ffmpeg(path)
    import imageio_ffmpeg

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with closing(imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")) as stream:
            width, height = next(stream)["size"]
            for data in stream:
                yield Image.frombytes("RGB", (width, height), data)
    except (OSError, RuntimeError, StopIteration, IndexError) as error:
        # What follows the first line is how ffmpeg was built.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no video that ffmpeg can read: {reason}") from error


def write_film(frames: Iterable[np.ndarray], path: Path, *, rate: int, quality: int = 12) -> Path:
    """Write uint8 frames [H, W, 3] as H.264 one by one, so that memory does not grow with the length; returns the path.

    `quality` is x264's constant rate factor, lower is better; `rate` frames are one second. The file appears when it is
    whole. Odd sizes are stored by repeating the last row or column, which H.264's 4:2:0 needs.

    Raises:
        ValueError: there is no frame, frames differ in size, or imageio-ffmpeg is missing.
    """
    require_ffmpeg(path)
    import imageio_ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    writer, size = None, None
    try:
        for frame in frames:
            if size is None:
                size = frame.shape
                writer = imageio_ffmpeg.write_frames(
                    str(partial),
                    (size[1] + size[1] % 2, size[0] + size[0] % 2),
                    fps=rate,
                    codec="libx264",
                    macro_block_size=1,
                    # One thread writes the same bytes on every machine.
                    output_params=["-crf", str(quality), "-threads", "1", "-bitexact"],
                )
                writer.send(None)
            if frame.shape != size or frame.dtype != np.uint8:
                raise ValueError(f"{path}: a frame is {frame.dtype} {frame.shape} after uint8 {size}")
            assert writer is not None
            pad = ((0, size[0] % 2), (0, size[1] % 2), (0, 0))
            writer.send(np.ascontiguousarray(np.pad(frame, pad, mode="edge")))
        if writer is None:
            raise ValueError(f"{path}: a video needs at least 1 frame")
    except BaseException:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    partial.replace(path)
    return path
