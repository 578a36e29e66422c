"""Consistency training without a teacher (ECT, arXiv:2406.14548): two states of the same data and noise.

Legend: B batch; states and predictions x0 = f(x_t, t) are [B, ...]; t, r [B], r < t. fp32 at least, fp64 where an input
is fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep, Networks, Noised
from fewstep.consistency.sample_loss import (
    ConsistencyLoss,
    consistency_difference,
    pseudo_huber,
    reduce_sample,
    weighted_loss,
)
from fewstep.consistency.sections import EctConfig
from fewstep.consistency.times import ect_times
from fewstep.core.paths import add_noise, at_least_fp32, x0_from_velocity
from fewstep.core.shapes import require_same_shape


def shared_noise_states(x0: Tensor, eps: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, x_r) with one data and one noise: the pair of consistency training (ECT, arXiv:2406.14548). r = 0 gives x0.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, eps=eps)
    return add_noise(x0, eps, t), add_noise(x0, eps, r)


def pseudo_huber_loss(
    prediction: Tensor, target: Tensor, *, constant: float, weight: Tensor | None = None
) -> ConsistencyLoss:
    """mean over the batch of weight (sqrt(|f - stop target|^2 + c^2) - c), the norm over a whole sample.

    Consistency training with this metric (arXiv:2310.14189; ECT, arXiv:2406.14548: c 0 or 1e-8 for CIFAR-10,
    0.06 for ImageNet-64). `ConsistencyLoss.error` is the metric. With c = 0 an exact prediction has gradient 0.

    Raises:
        ValueError: shapes differ, weight is not [B], or c is negative.
    """
    difference, usable = consistency_difference(prediction, target)
    return weighted_loss(pseudo_huber(reduce_sample(difference.square(), "sum"), constant), usable, weight)


def ect_weight(t: Tensor, r: Tensor, *, kind: Literal["snr", "gap"] = "snr", sigma_data: float = 0.5) -> Tensor:
    """ECT's weights [B], stated for sigma = t / (1 - t) and converted: with sd = sigma_data

        snr  (sigma^2 + sd^2) / (sigma sd)^2
        gap  1 / (sigma_t - sigma_r)

    r is used by "gap" alone. "snr" is infinite at t = 0, "gap" wherever r = t < 1.

    Raises:
        ValueError: the kind is unknown, or sigma_data is not positive.
    """
    if kind not in ("snr", "gap"):
        raise ValueError(f"weight {kind!r} is unknown; choose snr or gap")
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    t, r = at_least_fp32(t), at_least_fp32(r)
    if kind == "snr":
        return (t.square() + (sigma_data * (1 - t)).square()) / (sigma_data * t).square()
    return (1 - t) * (1 - r) / (t - r)


def ect_step(noised: Noised, networks: Networks, settings: EctConfig) -> ConsistencyStep:
    """Consistency training without a teacher: the student's x0 at t, and at the r that this stage of the run has."""
    stage = noised.step // settings.stage_steps
    # At t = 1 the noise-to-signal ratio is infinite, and so are the method's weights.
    times = ect_times(noised.t.clamp(max=settings.largest_time), stage=stage, q=settings.q)
    x_t, x_r = shared_noise_states(noised.x0, noised.eps, times.t, times.r)
    with torch.no_grad():
        target = x0_from_velocity(x_r, networks.student(x_r, times.r, noised.condition), times.r)
    prediction = x0_from_velocity(x_t, networks.wrapped(x_t, times.t, noised.condition), times.t)
    weight = ect_weight(times.t, times.r, kind=settings.weight, sigma_data=1.0)
    found = pseudo_huber_loss(prediction, target, constant=settings.huber, weight=weight)
    return ConsistencyStep(found.loss, {"isolated_samples": found.isolated_count.float()})
