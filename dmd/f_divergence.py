"""Weights that turn the reverse-KL gradient of DMD into that of another f-divergence (f-distill, arXiv:2502.15681).

With r = p_teacher(x_t) / p_student(x_t), read off the discriminator, the gradient of D_f is that of DMD with each
sample weighted by h(r) = f''(r) r^2 (Theorem 1). Order of a step: density_ratio, then TimeBinMeans if used, then
divergence_weight, then unit_mean; the result is the `weight` of `distribution_matching_loss`. Legend: B batch, K bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32

Divergence = Literal["rkl", "kl", "js", "softened_rkl", "neyman", "squared_hellinger", "jeffreys"]


def log_density_ratio(logits: Tensor) -> Tensor:
    """Mean logit of each sample over its heads or patches, [B], without graph: log r at the discriminator's optimum."""
    return at_least_fp32(logits.detach()).flatten(1).mean(dim=1) if logits.ndim > 1 else at_least_fp32(logits.detach())


def density_ratio(logits: Tensor, *, max_log_ratio: float = 10.0, lowest: float = 0.1, highest: float = 20.0) -> Tensor:
    """exp(mean logit) clamped to [lowest, highest], [B], without graph.

    `saturated_share` counts what the clamp changes.

    Args:
        logits: [B] or [B, ...] of the noised student samples, positive where the discriminator says real.
        max_log_ratio: bound of |log r| before the exponential, so that it cannot overflow. nan stays nan.
        lowest: smallest ratio.
        highest: largest ratio.

    Raises:
        ValueError: the bounds are not 0 < lowest < highest.
    """
    if not 0 < lowest < highest:
        raise ValueError(f"the ratio's bounds must satisfy 0 < lowest < highest, got {lowest} and {highest}")
    ratio = log_density_ratio(logits).clamp(-max_log_ratio, max_log_ratio).exp()
    return ratio.clamp(lowest, highest)


def saturated_share(logits: Tensor, *, lowest: float = 0.1, highest: float = 20.0) -> Tensor:
    """Share of samples, in [0, 1], whose ratio `density_ratio` clamps; near 1 the discriminator has won."""
    ratio = log_density_ratio(logits).exp()
    return ((ratio < lowest) | (ratio > highest)).to(ratio.dtype).mean()


def divergence_weight(ratio: Tensor, divergence: Divergence) -> Tensor:
    """h(r) = f''(r) r^2 up to a constant factor, elementwise (f-distill, arXiv:2502.15681, Table 1).

    D_f = E_student f(r). rkl seeks modes (h = 1, DMD itself); kl and jeffreys cover modes and weigh samples that the
    teacher finds likely; js, softened_rkl and squared_hellinger lie between; neyman seeks modes harder than rkl.

    Raises:
        ValueError: the divergence is unknown.
    """
    ratio = at_least_fp32(ratio.detach())
    if divergence == "rkl":
        return torch.ones_like(ratio)
    if divergence == "kl":
        return ratio
    if divergence == "js":
        return ratio / (1 + ratio)
    if divergence == "softened_rkl":
        return 1 / (1 + ratio)
    if divergence == "neyman":
        return 1 / ratio
    if divergence == "squared_hellinger":
        return ratio.sqrt()
    if divergence == "jeffreys":
        return 1 + ratio
    raise ValueError(
        f"divergence {divergence!r} is unknown; choose rkl, kl, js, softened_rkl, neyman, squared_hellinger or jeffreys"
    )


def unit_mean(weight: Tensor, *, mean: Tensor | None = None) -> Tensor:
    """weight [B] divided by its mean, so that the divergence does not change the step size.

    `mean` is the mean over all processes, 0-dim; None takes that of this batch.
    """
    return weight / (weight.mean() if mean is None else mean)


@dataclass(frozen=True, eq=False)
class TimeBinMeans:
    """Running means of the density ratio in equal bins of time: the discriminator's bias depends on t.

    For the true ratio the mean over student samples is 1 at every t, so r divided by its bin's mean removes that bias.
    A value, not a place: `updated` returns a new one, and the `means` are what a checkpoint keeps.

    Attributes:
        means: [K], positive.
        t_min, t_max: range that the bins divide; times outside fall into the outermost bins.
        decay: of the old mean, in [0, 1); 0 keeps the last batch alone.
    """

    means: Tensor
    t_min: float
    t_max: float
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.means.ndim != 1 or self.means.numel() == 0:
            raise ValueError(f"means must be [K] with K >= 1, got shape {tuple(self.means.shape)}")
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"time bins need 0 <= t_min < t_max <= 1, got {self.t_min} and {self.t_max}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def bin_index(self, t: Tensor) -> Tensor:
        """Bin of each time, int64, shape of t."""
        place = (at_least_fp32(t) - self.t_min) / (self.t_max - self.t_min) * self.means.numel()
        return place.floor().long().clamp(0, self.means.numel() - 1)

    def updated(self, ratio: Tensor, t: Tensor) -> TimeBinMeans:
        """The means after a batch: ratio [B] at times t [B]; a bin without samples keeps its mean.

        With several processes, pass what was gathered from all, so that all keep the same means.
        """
        ratio, index = at_least_fp32(ratio.detach()).to(self.means.dtype), self.bin_index(t)
        totals = torch.zeros_like(self.means).index_add(0, index, ratio)
        counts = torch.zeros_like(self.means).index_add(0, index, torch.ones_like(ratio))
        fresh = self.decay * self.means + (1 - self.decay) * totals / counts.clamp(min=1)
        means = torch.where(counts > 0, fresh, self.means)
        return TimeBinMeans(means, t_min=self.t_min, t_max=self.t_max, decay=self.decay)

    def normalise(self, ratio: Tensor, t: Tensor) -> Tensor:
        """ratio [B] divided by the mean of its bin."""
        return at_least_fp32(ratio.detach()) / self.means[self.bin_index(t)]


def initial_time_bins(
    *, bins: int = 10, t_min: float, t_max: float, decay: float = 0.0, device: torch.device | str = "cpu"
) -> TimeBinMeans:
    """Means of one in every bin, fp32: the value for equal distributions.

    Raises:
        ValueError: bins < 1, or the range or the decay is invalid.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return TimeBinMeans(torch.ones(bins, device=device), t_min=t_min, t_max=t_max, decay=decay)
