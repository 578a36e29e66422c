"""Rotary positions (arXiv:2104.09864) of Wan, computed from integers instead of read from a table that ends.

Legend: M tokens, d width of a head; a head's width is split into time, height and width as in diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# diffusers has it as a default argument of its module, not in the network's configuration.
THETA = 10000.0


@dataclass(frozen=True)
class FrameGrid:
    """Tokens of one latent frame: height x width patches."""

    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Tokens per frame."""
        return self.height * self.width


def rotary_angles(
    positions: Sequence[int], grid: FrameGrid, widths: tuple[int, int, int], *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, 1, M, d] for the tokens of frames at these positions, each angle twice as Wan has it.

    Only differences of positions enter attention, so the smallest one is moved to 0: an hour into a stream the angles
    are those of its first minute, to the last bit.

    Args:
        positions: temporal position of each frame, any integers.
        grid: patches of a frame.
        widths: how the width of a head is split into time, height and width; even numbers.
        device: where the angles live.
        dtype: fp32, or fp64.

    Raises:
        ValueError: no frames.
    """
    if len(positions) == 0:
        raise ValueError("rotary angles need at least one frame")
    lowest = min(positions)
    times = torch.tensor([position - lowest for position in positions], dtype=torch.float64, device=device)
    rows = torch.arange(grid.height, dtype=torch.float64, device=device)
    columns = torch.arange(grid.width, dtype=torch.float64, device=device)
    shape = (len(positions), grid.height, grid.width)
    parts = [
        _angles(times, widths[0])[:, None, None].expand(*shape, -1),
        _angles(rows, widths[1])[None, :, None].expand(*shape, -1),
        _angles(columns, widths[2])[None, None].expand(*shape, -1),
    ]
    angles = torch.cat(parts, dim=-1).flatten(0, 2)[None, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _angles(positions: Tensor, width: int) -> Tensor:
    """[n, width]: position times theta^(-2 i / width), each twice."""
    powers = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    return (positions[:, None] * THETA**-powers).repeat_interleave(2, dim=1)
