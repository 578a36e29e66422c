"""Consistency in discrete time: a step of the teacher, or of noise, in place of the derivative.

    loss = weight d( f(x_t, t), stop f(x_r, r) ),   r < t

Distillation (dCM) takes x_r from a step of the teacher; training without one (CT, ECT) from the same data and noise.
The discrete gradient over the step tends to the continuous one, with an error of the order of the step.

Legend: B batch; states, velocities, predictions [B, ...]; t, r, tau [B]. Predictions are x0 = f(x_t, t). Arithmetic in
fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.consistency.scm_loss import ConsistencyLoss, Reduction, finite_samples, keep_samples, reduce_sample
from fewstep.core.paths import add_noise, at_least_fp32, expand_time
from fewstep.dmd.loss import expand_weight, require_same_shape


def teacher_step(x_t: Tensor, velocity: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r = x_t + (r - t) velocity: the teacher's Euler step in rectified flow, without graph.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x_t=x_t, velocity=velocity)
    with torch.no_grad():
        return at_least_fp32(x_t) + (expand_time(r, x_t) - expand_time(t, x_t)) * at_least_fp32(velocity)


@torch.no_grad()
def trig_teacher_step(x_tau: Tensor, trig: Tensor, tau: Tensor, end: Tensor, *, sigma_data: float = 1.0) -> Tensor:
    """x_end = cos(tau - end) x_tau - sin(tau - end) sigma_data F: DDIM, exact for a constant x0 and noise.

    arXiv:2410.11081. F is the teacher's at (x_tau, tau); `end` is the angle [B] that is reached.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x_tau=x_tau, trig=trig)
    turn = expand_time(tau, x_tau) - expand_time(end, x_tau)
    return torch.cos(turn) * at_least_fp32(x_tau) - torch.sin(turn) * sigma_data * at_least_fp32(trig)


def shared_noise_states(x0: Tensor, eps: Tensor, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, x_r) with one data and one noise: the pair of consistency training (ECT, arXiv:2406.14548). r = 0 gives x0.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, eps=eps)
    return add_noise(x0, eps, t), add_noise(x0, eps, r)


def consistency_distillation_loss(
    prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean", weight: Tensor | None = None
) -> ConsistencyLoss:
    """mean over the batch of weight |f(x_t, t) - stop f(x_r, r)|^2 (consistency distillation, arXiv:2303.01469).

    Args:
        prediction: [B, ...] x0 of the student at (x_t, t), with graph.
        target: [B, ...] x0 of the student at (x_r, r), x_r from the teacher's step; x_r itself where r = 0.
        reduction: over the elements of a sample; rCM's warm-up sums and multiplies by 100.
        weight: [B], None is 1.

    Raises:
        ValueError: shapes differ, weight is not [B], or the reduction is unknown.
    """
    difference, usable = _difference(prediction, target)
    return _weighted(reduce_sample(difference.square(), reduction), usable, weight)


def pseudo_huber_loss(
    prediction: Tensor, target: Tensor, *, constant: float, weight: Tensor | None = None
) -> ConsistencyLoss:
    """mean over the batch of weight (sqrt(|f - stop target|^2 + c^2) - c), the norm over a whole sample.

    Consistency training with this metric (arXiv:2310.14189; ECT, arXiv:2406.14548: c 0 or 1e-8 for CIFAR-10,
    0.06 for ImageNet-64). `ConsistencyLoss.error` is the metric. With c = 0 an exact prediction has gradient 0.

    Raises:
        ValueError: shapes differ, weight is not [B], or c is negative.
    """
    difference, usable = _difference(prediction, target)
    return _weighted(pseudo_huber(reduce_sample(difference.square(), "sum"), constant), usable, weight)


def pseudo_huber(squares: Tensor, constant: float) -> Tensor:
    """sqrt(squares + c^2) - c of squared distances, of any shape; the gradient at 0 is 0 even for c = 0.

    Raises:
        ValueError: c is negative.
    """
    if constant < 0:
        raise ValueError(f"the constant must be 0 or more, got {constant}")
    inside = squares + constant**2
    positive = inside > 0
    return torch.where(positive, torch.where(positive, inside, 1.0).sqrt(), 0.0) - constant


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


@torch.no_grad()
def discrete_trig_tangent(
    x_tau: Tensor,
    network: Tensor,
    network_end: Tensor,
    teacher: Tensor,
    angles: tuple[Tensor, Tensor],
    *,
    warmup: float = 1.0,
    sigma_data: float = 1.0,
) -> Tensor:
    """A difference quotient in place of df/dtau (sCM's discrete ablation, arXiv:2410.11081), [B, ...].

        -cos(end) sd (F - F_T) - r sin(end) (x + sd (cos(tau - end) F - F_end) / sin(tau - end))

    It lacks the factor cos(tau) of `trig_tangent`: multiply by it to exchange one for the other.

    Args:
        x_tau: [B, ...] state at tau.
        network: F of the student at (x_tau, tau).
        network_end: F of the student at (x_end, end), x_end from `trig_teacher_step`.
        teacher: F_T at (x_tau, tau).
        angles: (tau, end), each [B], 0 <= end < tau.
        warmup: r in [0, 1].
        sigma_data: sd.

    Raises:
        ValueError: shapes differ, or r is outside [0, 1].
    """
    require_same_shape(x_tau=x_tau, network=network, network_end=network_end, teacher=teacher)
    if not 0 <= warmup <= 1:
        raise ValueError(f"the warm-up factor must lie in [0, 1], got {warmup}")
    tau, end = (expand_time(angle, x_tau) for angle in angles)
    turn = tau - end
    network = at_least_fp32(network)
    slope = (torch.cos(turn) * network - at_least_fp32(network_end)) / torch.sin(turn)
    gap = -torch.cos(end) * sigma_data * (network - at_least_fp32(teacher))
    return gap - warmup * torch.sin(end) * (at_least_fp32(x_tau) + sigma_data * slope)


def boundary_scale(x: Tensor, x0: Tensor, timestep: Tensor, *, sigma_data: float = 0.5, scaling: float = 4.0) -> Tensor:
    """f = c_skip x + c_out x0 with f = x at timestep 0, for networks on 0 ... 999 that predict x0.

    c_skip = sd^2 / (k^2 + sd^2), c_out = k / sqrt(k^2 + sd^2), k = scaling timestep. The form of LCM
    (arXiv:2310.04378) with the scaling of the public MCM code (arXiv:2406.06890); 10 is LCM's own.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(x=x, x0=x0)
    k = scaling * expand_time(timestep, x)
    squares = k.square() + sigma_data**2
    return sigma_data**2 / squares * x + k / squares.sqrt() * x0


def _difference(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    require_same_shape(prediction=prediction, target=target)
    prediction, target = at_least_fp32(prediction), at_least_fp32(target.detach())
    usable = finite_samples(prediction, target)
    return keep_samples(prediction - target, usable), usable


def _weighted(error: Tensor, usable: Tensor, weight: Tensor | None) -> ConsistencyLoss:
    weighted = error if weight is None else keep_samples(expand_weight(weight.detach(), error) * error, usable)
    return ConsistencyLoss(weighted.mean(), error.detach(), ~usable)
