"""What can be said of a video without any weights, frame by frame, in memory of three frames.

Shapes: T frames of H x W pixels; a curve [T] or [T - 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Parts of a video of which the first and the last are compared.
PARTS = 4
LEVELS = ("brightness", "contrast", "saturation", "sharpness")


@dataclass(frozen=True)
class VideoCurves:
    """Curves of one video, all in units of 8-bit levels.

    change [T - 1]: mean absolute difference of neighbouring frames. bend [T - 2]: mean absolute second difference over
    two, which flickers have and even motion does not. brightness, contrast, saturation [T]: mean of grey, its
    deviation, and the mean range of the three channels. sharpness [T]: mean absolute Laplacian of grey.
    """

    change: np.ndarray
    bend: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    sharpness: np.ndarray

    def flickering(self) -> float:
        """VBench's temporal_flickering: (255 - mean change) / 255; it is meant for videos that stand still."""
        # The mean in float32, as VBench takes it.
        return (255.0 - self.change.astype(np.float32).mean().item()) / 255.0

    def drift(self, level: str) -> float:
        """Mean of the last quarter minus that of the first, of one of `LEVELS`."""
        curve = getattr(self, level)
        size = max(1, len(curve) // PARTS)
        return float(curve[-size:].mean() - curve[:size].mean())

    def boundary_ratio(self, starts: Sequence[int]) -> float:
        """Change into the first frames of chunks over that inside chunks; 1 where a boundary cannot be seen.

        `starts` are frames at which chunks begin. Raises ValueError when none lies inside the video.
        """
        inside = np.ones(len(self.change), dtype=bool)
        places = [start - 1 for start in starts if 0 < start <= len(self.change)]
        inside[places] = False
        if not places or not inside.any():
            raise ValueError(f"no chunk begins inside a video of {len(self.change) + 1} frames: {list(starts)}")
        # Still videos have nothing to compare; their boundaries are as still as the rest or infinitely less so.
        return float(self.change[places].mean() / max(self.change[inside].mean(), 1e-12))


def video_curves(frames: Iterable[Image.Image]) -> VideoCurves:
    """The curves of a video. Raises ValueError for fewer than three frames."""
    rows: dict[str, list[float]] = {name: [] for name in ("change", "bend", *LEVELS)}
    last, before = None, None
    for picture in frames:
        now = np.asarray(picture, dtype=np.float32)
        if last is not None:
            # As VBench does to the last bit: blue first, and the mean in float32.
            rows["change"].append(float(np.mean(np.abs(now - last)[:, :, ::-1].copy())))
        if last is not None and before is not None:
            rows["bend"].append(float(np.mean(np.abs(now - 2.0 * last + before))) / 2.0)
        _add_levels(rows, now)
        last, before = now, last
    if len(rows["bend"]) < 1:
        raise ValueError(f"a video of {len(rows['brightness'])} frames has no course; three are needed")
    return VideoCurves(**{name: np.array(values) for name, values in rows.items()})


def _add_levels(rows: dict[str, list[float]], frame: np.ndarray) -> None:
    grey = frame.mean(axis=2)
    rows["brightness"].append(float(grey.mean()))
    rows["contrast"].append(float(grey.std()))
    rows["saturation"].append(float((frame.max(axis=2) - frame.min(axis=2)).mean()))
    middle = grey[1:-1, 1:-1]
    sides = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    rows["sharpness"].append(float(np.abs(4.0 * middle - sides).mean()) if middle.size else 0.0)
