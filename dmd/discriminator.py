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
from fewstep.dmd.multi_scale_head import MultiScaleHead


def build_gan_heads(
    gan: GanConfig, denoiser: Denoiser, *, shape: tuple[int, ...], null: Condition, seed: int
) -> nn.Module:
    """The heads that settings ask for, on the features that a denoiser gives for latents of this shape.

    Raises:
        ValueError: the network has no such blocks, convolutions are asked for features that are no picture, or scales
            for features that are no video.
    """
    if gan.head == "mlp":
        return build_heads(denoiser, gan.chosen_blocks, width=gan.width, seed=seed)
    if gan.head == "multiscale":
        return multi_scale_heads(gan, denoiser, shape=shape, null=null, seed=seed)
    if len(shape) != 3:
        raise ValueError(f"gan.head 'conv' reads features as pictures, and latents are {shape}: use 'mlp' for videos")
    channels = denoiser.family.feature_channels(denoiser.network, gan.chosen_blocks)
    sizes = feature_sizes(denoiser, shape, null, gan.chosen_blocks)
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(channels, sizes, strict=True)
    return DiscriminatorHeads.of([ConvHead(count, size, generator=generator) for count, size in pairs])


def multi_scale_heads(
    gan: GanConfig, denoiser: Denoiser, *, shape: tuple[int, ...], null: Condition, seed: int
) -> DiscriminatorHeads:
    """A `MultiScaleHead` for each of the blocks, judged each by itself.

    Raises:
        ValueError: latents are no videos, frames are patched, or a scale is larger than the features.
    """
    if len(shape) != 4:
        raise ValueError(
            f"gan.head 'multiscale' reads features as videos, and latents are {shape}: use 'conv' or 'mlp'"
        )
    channels = denoiser.family.feature_channels(denoiser.network, gan.chosen_blocks)
    generator, heads = torch.Generator().manual_seed(seed), []
    for count, (h, w) in zip(channels, feature_sizes(denoiser, shape, null, gan.chosen_blocks), strict=True):
        patch = round(shape[2] / h)
        smallest = min(shape[1], patch * h, patch * w)
        if max(gan.scales) > smallest or count % patch**2:
            raise ValueError(
                f"gan.scales {list(gan.scales)} on features of {shape[1]} x {patch * h} x {patch * w} with {count} "
                f"channels: scales go to {smallest}, and channels are a multiple of {patch**2}"
            )
        heads.append(
            MultiScaleHead(
                count,
                (shape[1], h, w),
                patch=patch,
                scales=gan.scales,
                width=gan.width,
                dropout=gan.dropout,
                generator=generator,
            )
        )
    return DiscriminatorHeads.of(heads, apart=True)


@torch.no_grad()
def feature_sizes(
    denoiser: Denoiser, shape: tuple[int, ...], null: Condition, blocks: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(h, w) of each feature map for latents of this shape, found by one call; of videos those of each frame.

    Raises:
        ValueError: a feature map has another aspect than the latents, or fewer frames.
    """
    frames, (height, width) = shape[1] if len(shape) == 4 else 1, shape[-2:]
    device = null.device
    x, t = torch.zeros((1, *shape), device=device), torch.full((1,), 0.5, device=device)
    found = []
    for feature in denoiser.velocity_and_features(x, t, null, blocks)[1]:
        positions, factor = feature.shape[2], (frames * height * width / feature.shape[2]) ** 0.5
        size = round(height / factor), round(width / factor)
        if frames * size[0] * size[1] != positions:
            raise ValueError(
                f"gan.head 'conv' or 'multiscale' needs feature maps of the latents' aspect {shape[1:]}, "
                f"got {positions} positions"
            )
        found.append(size)
    return found
