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
