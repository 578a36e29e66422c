"""Streams to files, and what scripts read from the command line.

Legend: T pixel frames of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.causal_video.stream.state import ChunkOutput
from fewstep.core.media.videos import require_ffmpeg, write_film


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


def check_video_path(path: str | Path) -> None:
    """Raise ValueError unless `write_video` can write such a file on this machine."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path} must end in .gif or .mp4")
    if suffix == ".mp4":
        require_ffmpeg(path)


def write_video(images: Iterable[np.ndarray], path: str | Path, *, rate: int, scale: int = 1) -> Path:
    """Write frames, uint8 [H, W, 3] each, as .gif or .mp4; returns the path.

    An mp4 is written frame by frame as they come, in memory that does not grow; a GIF needs all of them at its end.

    Args:
        images: the frames, at least one.
        path: its suffix decides.
        rate: frames per second. GIFs count hundredths of a second, so theirs is rounded to whole ones.
        scale: each pixel becomes a square of so many.

    Raises:
        ValueError: no frames, a scale below 1, or see `check_video_path`.
    """
    check_video_path(path)
    if scale < 1:
        raise ValueError(f"a video needs a scale of at least 1, got {scale}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".mp4":
        return write_film((enlarged(image, scale) for image in images), path, rate=rate)
    pictures = [Image.fromarray(enlarged(image, scale)) for image in images]
    if len(pictures) == 0:
        raise ValueError(f"{path}: a video needs at least 1 frame")
    hundredths = max(2, round(100 / rate))
    draft = path.with_name(f".{path.stem}.partial{path.suffix}")
    pictures[0].save(draft, save_all=True, append_images=pictures[1:], duration=10 * hundredths, loop=0)
    draft.replace(path)
    return path


def enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    """A frame each of whose pixels is a square of so many."""
    return image if scale == 1 else image.repeat(scale, axis=0).repeat(scale, axis=1)


def until_told(outputs: Iterable[ChunkOutput], told: Callable[[], object]) -> Iterator[np.ndarray]:
    """The frames of a stream's first sample, chunk by chunk, up to the first chunk after which `told()` is true."""
    for output in outputs:
        yield from output.images()
        if told():
            return
