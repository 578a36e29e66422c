"""Actions that steer a video: names per pixel frame become conditioning channels per latent frame.

A steered network is a Wan transformer with a channel per action beside those of the latents. The first latent frame
stands for one pixel frame, each other one for four, so an action enters a latent frame with the share of its pixel
frames in which it was held (our reading; Matrix-Game 2 shows its network the actions frame by frame). The action of a
pixel frame is the one that leads to it from the frame before.

Legend: B batch, A actions, T pixel frames, F latent frames, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.causal_video.layout import TEMPORAL_STRIDE

# Nothing is pressed: zeros in every channel.
NONE = "none"


@dataclass(frozen=True)
class ActionSpace:
    """The actions a network knows, a conditioning channel each, in this order; "none" is all zeros.

    Raises:
        ValueError: no names, a name twice, or "none" among them.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) == 0 or len(set(self.names)) < len(self.names) or NONE in self.names:
            raise ValueError(f"actions need distinct names other than {NONE!r}, at least one, got {list(self.names)}")

    def one_hot(self, actions: Sequence[str]) -> Tensor:
        """[T, A] of a name per pixel frame. Raises ValueError for a name that is not known."""
        unknown = sorted(set(actions) - {NONE, *self.names})
        if unknown:
            raise ValueError(f"unknown actions {unknown}; known are {[NONE, *self.names]}")
        return torch.tensor([[float(name == action) for name in self.names] for action in actions])

    def channels(self, actions: str | Sequence[str], size: tuple[int, int, int, int], *, is_start: bool) -> Tensor:
        """Conditioning channels [B, A, F, h, w] of a piece of a stream.

        Args:
            actions: one name that is held, or a name per pixel frame.
            size: (B, F, h, w).
            is_start: whether the piece begins the video (or a cut), so that its first latent frame is one pixel frame.

        Raises:
            ValueError: an unknown name, or another number of names than pixel frames.
        """
        batch, frames, height, width = size
        count = TEMPORAL_STRIDE * frames - (TEMPORAL_STRIDE - 1 if is_start else 0)
        names = [actions] * count if isinstance(actions, str) else list(actions)
        if len(names) != count:
            raise ValueError(f"{frames} latent frames are {count} pixel frames here, got {len(names)} actions")
        latent = latent_actions(self.one_hot(names)[None], is_start=is_start)
        return spread(latent.expand(batch, -1, -1), height, width)


def latent_actions(actions: Tensor, *, is_start: bool = True) -> Tensor:
    """Actions of latent frames [B, A, F] from those of pixel frames [B, T, A]: means over the frames of each.

    Raises:
        ValueError: T is not 1 + 4 k at the start of a video, 4 k after it.
    """
    first = 1 if is_start else 0
    if actions.ndim != 3 or actions.shape[1] < 1 or (actions.shape[1] - first) % TEMPORAL_STRIDE:
        raise ValueError(
            f"actions must be [B, T, A] with T = {'1 + ' if is_start else ''}{TEMPORAL_STRIDE} k pixel frames "
            f"{'at' if is_start else 'after'} the start, got {list(actions.shape)}"
        )
    rest = actions[:, first:].unflatten(1, (-1, TEMPORAL_STRIDE)).mean(dim=2)
    return torch.cat([actions[:, :first], rest], dim=1).transpose(1, 2)


def spread(latent: Tensor, height: int, width: int) -> Tensor:
    """Channels [B, A, F, height, width] that are constant over a frame, from [B, A, F]."""
    return latent[..., None, None].expand(*latent.shape, height, width)
