"""Weights that turn the reverse-KL gradient of DMD into that of another f-divergence (f-distill, arXiv:2502.15681).

With r = p_teacher(x_t) / p_student(x_t), read off the discriminator, the gradient of D_f is that of DMD with each
sample weighted by h(r) = f''(r) r^2 (Theorem 1). Order of a step: density_ratio, then normalise_by_time if used, then
divergence_weight, then unit_mean; the result is the `weight` of `distribution_matching_loss`. Legend: B batch, K bins.
"""

from __future__ import annotations

from collections.abc import Callable
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


def bin_of_time(t: Tensor, *, bins: int, interval: tuple[float, float]) -> Tensor:
    """Number of the equal bin of the interval in which each time lies, int64; times outside fall into the outermost."""
    place = (at_least_fp32(t) - interval[0]) / (interval[1] - interval[0]) * bins
    return place.floor().long().clamp(0, bins - 1)


def normalise_by_time(
    ratio: Tensor,
    t: Tensor,
    *,
    bins: int,
    interval: tuple[float, float],
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Tensor:
    """ratio [B] at times t [B], divided by its mean within equal bins of time: the discriminator's bias depends on t.

    For the true ratio the mean over student samples is 1 at every t, so that the division removes that bias alone.
    Means are those of one batch over all processes, without memory of earlier ones.

    Raises:
        ValueError: bins < 1, or the interval is none within [0, 1].
    """
    if bins < 1 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"bins {bins} of the interval {interval}: give at least one bin, and 0 <= start < end <= 1")
    ratio, index = at_least_fp32(ratio.detach()), bin_of_time(t, bins=bins, interval=interval)
    sums = torch.zeros(2, bins, dtype=ratio.dtype, device=ratio.device)
    # The mean over processes of sums and of counts has the quotient of their totals.
    totals, counts = mean_over_processes(
        sums.index_add(1, index, torch.stack([ratio, torch.ones_like(ratio)]))
    ).unbind()
    return ratio / (totals / counts)[index]
