"""Streams to files, and what scripts read from the command line.

Legend: T pixel frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.export_utils import export_to_video
from diffusers.utils.import_utils import is_imageio_available
from PIL import Image
from torch import Tensor


def parse_switch(text: str) -> tuple[int, str]:
    """(chunk, prompt) of "12:a three moving up". Raises ValueError for another form."""
    chunk, separator, prompt = text.partition(":")
    if not separator or not chunk.strip().isdigit():
        raise ValueError(f"a switch is CHUNK:PROMPT, such as 12:a three moving up, got {text!r}")
    return int(chunk), prompt


def hold_last(actions: Sequence[str] | None, chunks: int) -> list[str] | None:
    """An action per chunk, the last one repeated; None stays None. Raises ValueError for more actions than chunks."""
    if actions is None:
        return None
    if not 1 <= len(actions) <= chunks:
        raise ValueError(f"{chunks} chunks take 1 to {chunks} actions, got {len(actions)}")
    return [actions[min(chunk, len(actions) - 1)] for chunk in range(chunks)]


def read_picture(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture file as [3, H, W] in [0, 1], cropped in the middle to the ratio of `size` (H, W) and resized.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        picture = Image.open(path).convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} is no picture ({error})") from error
    height, width = size
    ratio = min(picture.width / width, picture.height / height)
    left, top = (picture.width - ratio * width) / 2, (picture.height - ratio * height) / 2
    box = (left, top, left + ratio * width, top + ratio * height)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255


def check_video_path(path: str | Path) -> None:
    """Raise ValueError unless `write_video` can write such a file on this machine."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path} must end in .gif or .mp4")
    if suffix == ".mp4" and not is_imageio_available():
        raise ValueError(f"{path}: mp4 needs `pip install imageio imageio-ffmpeg`; .gif needs nothing")


def write_video(images: Sequence[np.ndarray], path: str | Path, *, rate: int, scale: int = 1) -> Path:
    """Write frames, uint8 [H, W, 3] each, as .gif or .mp4; returns the path.

    Args:
        images: the frames, at least one.
        path: its suffix decides.
        rate: frames per second. GIFs count hundredths of a second, so theirs is rounded to whole ones.
        scale: each pixel becomes a square of so many.

    Raises:
        ValueError: no frames, a scale below 1, or see `check_video_path`.
    """
    check_video_path(path)
    if len(images) == 0 or scale < 1:
        raise ValueError(f"a video needs at least 1 frame and a scale of at least 1, got {len(images)} and {scale}")
    pictures = [
        Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), Image.Resampling.NEAREST)
        for image in images
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".mp4":
        export_to_video(pictures, str(path), fps=rate)
    else:
        hundredths = max(2, round(100 / rate))
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=10 * hundredths, loop=0)
    return path
