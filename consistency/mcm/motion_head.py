"""The learned motion map of MCM (arXiv:2406.06890): a small network on the latents of each frame."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

GROUPS = 32


class MotionHead(nn.Module):
    """m(x) = x + last(norm(first(silu(x)))), 1 x 1 convolutions and a group norm on each frame; at first m(x) = x.

    The path around the layers keeps m from becoming constant, which would please both sides of the loss. The weights
    are drawn from `seed` alone, so all processes have the same head.

    Args:
        channels: of the latents.
        width: of the hidden layer, a multiple of 32.
        seed: decides the first layer; the last one starts at zero.
    """

    def __init__(self, channels: int, *, width: int = 64, seed: int) -> None:
        super().__init__()
        self.first, self.last = _pointwise(channels, width), _pointwise(width, channels)
        self.norm = nn.GroupNorm(GROUPS, width)
        bound, generator = 1 / math.sqrt(channels), torch.Generator().manual_seed(seed)
        for parameter in self.first.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] to maps of the same shape."""
        frames = rearrange(latents, "b c f h w -> (b f) c h w")
        hidden = self.norm(self.first(functional.silu(frames)))
        return latents + rearrange(self.last(hidden), "(b f) c h w -> b c f h w", b=len(latents))


def _pointwise(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1 x 1 convolution with unset weights: the usual constructor would draw from the global generator."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel_size=1)
    assert isinstance(layer, nn.Conv2d)
    return layer
