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
        self.first = uniform_linear(channels, width, generator)
        self.second = uniform_linear(width, width, generator)
        self.logit = unset_linear(width, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)
        self.activation = nn.SiLU()

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, C, N] to logits [B] in the dtype of the head's weights."""
        x = self.norm(features.transpose(1, 2).to(self.norm.weight.dtype))
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.logit(x).mean(dim=(1, 2))


class ConvHead(nn.Module):
    """One feature map to one logit as DMD2's classifier has it: convolutions of 4 x 4 with stride 2 down to 4 x 4, one
    of 4 x 4 over what is left, each with a group norm and SiLU, and a 1 x 1 convolution to the logit.

    For Stable Diffusion XL at 1024 pixels (32 x 32 in the middle block) that is three and one, for 1.5 at 512 pixels
    (8 x 8) one and one (DMD2, arXiv:2405.14867, public code). The last layer starts at zero, as in the other head.

    Args:
        channels: C, the width of all layers, 4 or more.
        size: (h, w) of the feature map.
        generator: a CPU generator.
    """

    def __init__(self, channels: int, size: tuple[int, int], *, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        layers: list[nn.Module] = []
        height, width = size
        groups = norm_groups(channels)
        while min(height, width) >= 8:
            layers += [uniform_conv(channels, (4, 4), 2, 1, generator), nn.GroupNorm(groups, channels), nn.SiLU()]
            height, width = height // 2, width // 2
        kernel = (min(4, height), min(4, width))
        layers += [uniform_conv(channels, kernel, kernel[0], 0, generator), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.logit = nn.utils.skip_init(nn.Conv2d, channels, 1, 1)
        for parameter in self.logit.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, C, h w] to logits [B] in the dtype of the head's weights."""
        weight = self.logit.get_parameter("weight")
        maps = features.unflatten(2, self.size).to(weight.dtype)
        return self.logit(self.layers(maps)).mean(dim=(1, 2, 3))


class DiscriminatorHeads(nn.Module):
    """One head for each feature map; the discriminator's logit is the mean of theirs, or each is judged by itself.

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
        self.apart = False

    @classmethod
    def of(cls, heads: Sequence[nn.Module], *, apart: bool = False) -> DiscriminatorHeads:
        """These heads, one for each feature map; `apart` leaves each its logit."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.heads = nn.ModuleList(heads)
        made.apart = apart
        return made

    def forward(self, features: Sequence[Tensor], noise: Tensor | None = None) -> Tensor:
        """Feature maps [B, C, N], one per head, to logits [B], or [B, heads] of heads apart; a large one says real.

        `noise` [B, heads, width] decides the dropout of `MultiScaleHead`; none leaves nothing out.

        Raises:
            ValueError: there are more or fewer feature maps than heads.
        """
        if len(features) != len(self.heads):
            raise ValueError(
                f"{len(self.heads)} heads got {len(features)} feature maps: build them for the same blocks"
            )
        if noise is None:
            logits = [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        else:
            logits = [
                head(feature, noise[:, n]) for n, (head, feature) in enumerate(zip(self.heads, features, strict=True))
            ]
        return torch.stack(logits, dim=1) if self.apart else torch.stack(logits).mean(dim=0)


def build_heads(denoiser: Denoiser, blocks: Sequence[int] | None, *, width: int, seed: int) -> DiscriminatorHeads:
    """Heads for the features that `denoiser.velocity_and_features(..., blocks)` gives."""
    return DiscriminatorHeads(denoiser.family.feature_channels(denoiser.network, blocks), width=width, seed=seed)


def norm_groups(channels: int) -> int:
    """Groups of a norm over so many channels: at most 32, and at least four numbers in each where there are four: over
    a single one a norm would leave nothing."""
    return max(number for number in range(1, 33) if channels % number == 0 and (number == 1 or channels >= 4 * number))


def uniform_conv(
    channels: int, kernel: tuple[int, ...], stride: int, padding: int, generator: torch.Generator
) -> nn.Module:
    """A convolution with weights and biases uniform within 1 / sqrt(fan_in), from `generator` and no other source."""
    kind = nn.Conv2d if len(kernel) == 2 else nn.Conv3d
    layer = nn.utils.skip_init(kind, channels, channels, kernel, stride=stride, padding=padding)
    bound = 1 / math.sqrt(channels * math.prod(kernel))
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


def uniform_linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with weights and biases uniform within 1 / sqrt(inputs), from `generator` and no other source."""
    layer = unset_linear(inputs, outputs)
    bound = 1 / math.sqrt(inputs)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer


def unset_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with unset weights: the usual constructor would draw from the global generator."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    return layer
