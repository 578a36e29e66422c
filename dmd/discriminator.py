"""The heads of the discriminator beside DMD, made for the features that they judge.

Legend: latents [C, h, w] or [C, F, h, w]; feature maps [1, C, N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import ConvHead, DiscriminatorHeads, build_heads
from fewstep.dmd.config import GanConfig


def build_gan_heads(
    gan: GanConfig, denoiser: Denoiser, *, shape: tuple[int, ...], null: Condition, seed: int
) -> nn.Module:
    """The heads that settings ask for, on the features that a denoiser gives for latents of this shape.

    Raises:
        ValueError: the network has no such blocks, or convolutions are asked for features that are no picture.
    """
    if gan.head == "mlp":
        return build_heads(denoiser, gan.chosen_blocks, width=gan.head_width, seed=seed)
    if len(shape) != 3:
        raise ValueError(f"gan.head 'conv' reads features as pictures, and latents are {shape}: use 'mlp' for videos")
    channels = denoiser.family.feature_channels(denoiser.network, gan.chosen_blocks)
    sizes = feature_sizes(denoiser, shape, null, gan.chosen_blocks)
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(channels, sizes, strict=True)
    return DiscriminatorHeads.of([ConvHead(count, size, generator=generator) for count, size in pairs])


@torch.no_grad()
def feature_sizes(
    denoiser: Denoiser, shape: tuple[int, ...], null: Condition, blocks: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(h, w) of each feature map for latents of this shape, found by one call.

    Raises:
        ValueError: a feature map has another aspect than the latents.
    """
    device = null.tokens.device
    x, t = torch.zeros((1, *shape), device=device), torch.full((1,), 0.5, device=device)
    found = []
    for feature in denoiser.velocity_and_features(x, t, null, blocks)[1]:
        positions, factor = feature.shape[2], (shape[1] * shape[2] / feature.shape[2]) ** 0.5
        size = round(shape[1] / factor), round(shape[2] / factor)
        if size[0] * size[1] != positions:
            raise ValueError(f"gan.head 'conv' needs feature maps of the latents' aspect {shape[1:]}, got {positions}")
        found.append(size)
    return found
