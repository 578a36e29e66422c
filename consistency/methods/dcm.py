"""Consistency in discrete time: a step of the teacher, or of noise, in place of the derivative.

    loss = weight d( f(x_t, t), stop f(x_r, r) ),   r < t

Distillation (dCM) takes x_r from a step of the teacher; training without one (CT, ECT) from the same data and noise.
The discrete gradient over the step tends to the continuous one, with an error of the order of the step.

Legend: B batch; states, velocities, predictions [B, ...]; t, r, tau [B]. Predictions are x0 = f(x_t, t). Arithmetic in
fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks, Noised
from fewstep.consistency.sample_loss import (
    ConsistencyLoss,
    Reduction,
    consistency_difference,
    reduce_sample,
    weighted_loss,
)
from fewstep.consistency.sections import GridConfig
from fewstep.consistency.times import TimePair, grid_times
from fewstep.core.paths import at_least_fp32, expand_time, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.shapes import require_same_shape


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
    rotation = expand_time(tau, x_tau) - expand_time(end, x_tau)
    return torch.cos(rotation) * at_least_fp32(x_tau) - torch.sin(rotation) * sigma_data * at_least_fp32(trig)


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
    difference, usable = consistency_difference(prediction, target)
    return weighted_loss(reduce_sample(difference.square(), reduction), usable, weight)


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
    rotation = tau - end
    network = at_least_fp32(network)
    slope = (torch.cos(rotation) * network - at_least_fp32(network_end)) / torch.sin(rotation)
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


def grid_pair(draw: Draw, settings: GridConfig) -> TimePair:
    """A random time of the teacher's grid for each sample, and the one after it."""
    return grid_times(draw.uniform("consistency_grid"), steps=settings.grid_steps, shift=settings.grid_shift)


def dcm_step(data: DataBatch, times: TimePair, networks: Networks) -> ConsistencyStep:
    """Discrete consistency distillation: the student's x0 before and after one Euler step of the teacher's grid."""
    prediction, target = distilled_pair(data.at(times.t), times, networks)
    found = consistency_distillation_loss(prediction, target)
    return ConsistencyStep(found.loss, {"isolated_samples": found.isolated_count.float()})


def distilled_pair(noised: Noised, times: TimePair, networks: Networks) -> tuple[Tensor, Tensor]:
    """The student's x0 at the t of `times`, with graph, and at their r after one Euler step of the teacher, without.

    `noised` is at the t of `times`.
    """
    x_t, condition = noised.x_t, noised.condition
    velocity = networks.teacher_velocity(x_t, times.t, condition)
    x_r = teacher_step(x_t, velocity, times.t, times.r)
    with torch.no_grad():
        target = x0_from_velocity(x_r, networks.student(x_r, times.r, condition), times.r)
    return x0_from_velocity(x_t, networks.wrapped(x_t, times.t, condition), times.t), target
