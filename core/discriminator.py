"""Discriminator heads on the features of a denoiser (DMD2, arXiv:2405.14867, Sec. 4.3).

Legend: B batch, C channels, N positions, H width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser


class DiscriminatorHead(nn.Module):
    """One feature map to one logit: two layers on each position, then the mean over positions.

    The weights are drawn from `generator` alone, so all processes that seed it alike have the same head. The last layer
    starts at zero: the first logits are 0, a discriminator at chance.

    Args:
        channels: C.
        width: H.
        generator: a CPU generator.
    """

    def __init__(self, channels: int, *, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first = _uniform_linear(channels, width, generator)
        self.second = _uniform_linear(width, width, generator)
        self.logit = _linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)
        self.activation = nn.SiLU()

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, C, N] to logits [B] in the dtype of the head's weights."""
        x = self.norm(features.transpose(1, 2).to(self.norm.weight.dtype))
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.logit(x).mean(dim=(1, 2))


class DiscriminatorHeads(nn.Module):
    """One head for each feature map; the discriminator's logit is the mean of theirs.

    Args:
        channels: C of each feature map.
        width: H.
        seed: decides all weights.

    Raises:
        ValueError: there is no feature map, or a size is not positive.
    """

    def __init__(self, channels: Sequence[int], *, width: int, seed: int) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or width < 1:
            raise ValueError(
                f"heads need at least one feature map and positive sizes, got channels {list(channels)}, width {width}"
            )
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleList(DiscriminatorHead(count, width=width, generator=generator) for count in channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps [B, C, N], one per head, to logits [B]; a large one says real.

        Raises:
            ValueError: there are more or fewer feature maps than heads.
        """
        if len(features) != len(self.heads):
            raise ValueError(
                f"{len(self.heads)} heads got {len(features)} feature maps: build them for the same blocks"
            )
        return torch.stack([head(feature) for head, feature in zip(self.heads, features, strict=True)]).mean(dim=0)


def build_heads(denoiser: Denoiser, blocks: Sequence[int] | None, *, width: int, seed: int) -> DiscriminatorHeads:
    """Heads for the features that `denoiser.velocity_and_features(..., blocks)` gives."""
    return DiscriminatorHeads(denoiser.family.feature_channels(denoiser.network, blocks), width=width, seed=seed)


def _uniform_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with weights and biases uniform within 1 / sqrt(inputs), from `generator` and no other source."""
    layer = _linear(inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with unset weights: the usual constructor would draw from the global generator."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    return layer
