"""Which frames of a video MCM's image discriminator looks at (arXiv:2406.06890).

Legend: B batch, S judged frames of a video; videos [B, C, F, h, w], places [S, B] int64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frame_places(uniform: Tensor, frames: int) -> Tensor:
    """One frame of each of S parts of a video, all frames of a part alike probable: [S, B] int64.

    Part s is the frames from floor(s F / S) up to floor((s + 1) F / S), the latter not included.

    Args:
        uniform: [S, B] in [0, 1).
        frames: F, at least S.

    Raises:
        ValueError: there are fewer frames than parts.
    """
    parts = len(uniform)
    if not 1 <= parts <= frames:
        raise ValueError(
            f"{parts} judged frames of a video of {frames}; judge from 1 to {frames} (mcm.discriminator.frames)"
        )
    edges = torch.tensor([part * frames // parts for part in range(parts + 1)], device=uniform.device)
    first, length = edges[:-1, None], edges.diff()[:, None]
    # A uniform number close to 1 may be rounded up by the product.
    return first + torch.minimum((uniform * length).long(), length - 1)


def pick_frames(video: Tensor, places: Tensor) -> Tensor:
    """Frames as videos of one frame, [S B, C, 1, h, w]: first one of every video, then the next of every video.

    `Condition.repeat(S)` has the same order. The gradient reaches the picked frames alone.

    Raises:
        ValueError: the video has not five axes, or places is not [S, B].
    """
    if video.ndim != 5 or places.ndim != 2 or places.shape[1] != len(video):
        raise ValueError(
            f"frames are picked from videos [B, C, F, h, w] at places [S, B], got {tuple(video.shape)} and "
            f"{tuple(places.shape)}"
        )
    samples = torch.arange(len(video), device=video.device).expand(len(places), -1)
    return video[samples.flatten(), :, places.flatten()].unsqueeze(2)
