"""Discriminator heads of StyleGAN-T (arXiv:2301.09515) on the tokens of a network's blocks, as SANA-Sprint has them.

Legend: B batch, C channels, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

# Samples that share the statistics of a norm.
VIRTUAL_BATCH = 8


class LocalNorm(nn.Module):
    """Batch norm over at most 8 samples at a time and all positions, with the batch's own statistics always."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """x [B, C, N]; samples of different `sizes`, which sum to B, share no statistics."""
        parts = []
        for part in x.float().split(list(sizes)):
            for group in part.tensor_split(math.ceil(len(part) / VIRTUAL_BATCH)):
                mean = group.mean(dim=(0, 2), keepdim=True)
                variance = group.var(dim=(0, 2), keepdim=True, unbiased=False)
                parts.append((group - mean) / (variance + 1e-5).sqrt())
        return torch.cat(parts) * self.weight[None, :, None] + self.bias[None, :, None]


class ProjectedHead(nn.Module):
    """One block's tokens to a logit at each position: two convolutions along them, of 1 and 9, with local norms.

    Weights are divided by their largest singular value, which follows them by one power iteration in each call of the
    head in training mode. Tokens are taken in their order, row by row, as in the source (NVlabs/Sana).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _bounded(nn.Conv1d(channels, channels, 1))
        self.first_norm = LocalNorm(channels)
        self.second = _bounded(nn.Conv1d(channels, channels, 9, padding=4, padding_mode="circular"))
        self.second_norm = LocalNorm(channels)
        self.logit = _bounded(nn.Conv1d(channels, 1, 1))

    def forward(self, features: Tensor, sizes: Sequence[int]) -> Tensor:
        """Features [B, C, N] to logits [B, N]."""
        x = functional.leaky_relu(self.first_norm(self.first(features.float()), sizes), 0.2)
        y = functional.leaky_relu(self.second_norm(self.second(x), sizes), 0.2)
        return self.logit((x + y) / math.sqrt(2)).squeeze(1)


class ProjectedHeads(nn.Module):
    """A head for each feature map; every position of each has a logit of its own.

    Args:
        channels: C of each feature map.
        seed: decides all weights.
    """

    def __init__(self, channels: Sequence[int], *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(ProjectedHead(count) for count in channels)

    def forward(self, features: Sequence[Tensor], sizes: Sequence[int] | None = None) -> Tensor:
        """Feature maps [B, C, N] to logits [B, heads N]; a large one says real. Without `sizes` they are one batch."""
        sizes = [len(features[0])] if sizes is None else sizes
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(feature, sizes) for head, feature in pairs], dim=1)


def _bounded(layer: nn.Conv1d) -> nn.Module:
    return spectral_norm(layer, n_power_iterations=1, eps=1e-12)
