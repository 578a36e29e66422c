"""AlphaFlow: one family from trajectory flow matching (alpha = 1) to MeanFlow (alpha -> 0). No derivative is needed.

    s = alpha r + (1 - alpha) t,   x_s = x_t - (t - s) v
    target = alpha v + (1 - alpha) u(x_s, s, r),   loss = |u(x_t, t, r) - stop target|^2 / alpha

At alpha = 1/2 with model velocities these are shortcut models. Only in the limit alpha -> 0 is u* the fixed point; else
it is off by the order of alpha. The schedule starts at 1, where training is easy, and ends in the derivative form of
`meanflow.py`. Notation as there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks
from fewstep.consistency.methods.flow_map import flow_batch, flow_record, folded_guide
from fewstep.consistency.methods.meanflow import derivative_form
from fewstep.consistency.sample_loss import ConsistencyLoss, consistency_difference, reduce_sample
from fewstep.consistency.sections import AlphaflowConfig
from fewstep.consistency.times import TimePair
from fewstep.core.paths import at_least_fp32, expand_time
from fewstep.core.shapes import require_same_shape


@torch.no_grad()
def alphaflow_state(x_t: Tensor, velocity: Tensor, t: Tensor, r: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """(x_s, s): the state a share alpha of the way from t to r, along the velocity.

    Raises:
        ValueError: shapes differ, or alpha is not in (0, 1].
    """
    require_same_shape(x_t=x_t, velocity=velocity)
    _require_alpha(alpha)
    t, r = at_least_fp32(t), at_least_fp32(r)
    # t - alpha (t - r) keeps s between r and t, and at t where r = t.
    s = t - alpha * (t - r)
    return at_least_fp32(x_t) - expand_time(t - s, x_t) * at_least_fp32(velocity), s


@torch.no_grad()
def alphaflow_target(velocity: Tensor, ahead: Tensor, *, alpha: float) -> Tensor:
    """alpha v + (1 - alpha) u(x_s, s, r); at alpha = 1 `ahead` has no weight and need not be computed (pass v).

    Raises:
        ValueError: shapes differ, or alpha is not in (0, 1].
    """
    require_same_shape(velocity=velocity, ahead=ahead)
    _require_alpha(alpha)
    return alpha * at_least_fp32(velocity) + (1 - alpha) * at_least_fp32(ahead)


def alphaflow_loss(
    prediction: Tensor, target: Tensor, *, alpha: float, constant: float | None = 1e-3
) -> ConsistencyLoss:
    """mean over the batch of weight |u - stop target|^2, summed over a sample.

    weight = stop(alpha / (|u - target|^2 + c)): the target lies within alpha of u, so the square is of the order of
    alpha^2 near the end of training, and of 1 at alpha = 1. With c None the weight is 1 / alpha, the plain loss.

    Raises:
        ValueError: shapes differ, alpha is not in (0, 1], or c is not positive.
    """
    _require_alpha(alpha)
    if constant is not None and not constant > 0:
        raise ValueError(f"the constant must be positive, or None for the plain loss, got {constant}")
    difference, usable = consistency_difference(prediction, target)
    error = reduce_sample(difference.square(), "sum")
    weighted = error / alpha if constant is None else alpha / (error.detach() + constant) * error
    return ConsistencyLoss(weighted.mean(), error.detach(), ~usable)


def alpha_schedule(
    progress: float, *, start: float = 0.0, end: float = 1.0, temperature: float = 25.0, floor: float = 5e-3
) -> float:
    """alpha at a point of training: a sigmoid from 1 down to 0, centred between start and end.

    1 - sigmoid(temperature (progress - (start + end) / 2) / (end - start)); above 1 - floor it is 1, below floor it is
    0, which means: change to the derivative form. That both ends are cut, and that the temperature counts in lengths of
    end - start, is our reading.

    Args:
        progress: share of training done, in [0, 1].
        start: share at which alpha begins to leave 1.
        end: share at which it has reached 0.
        temperature: steepness.
        floor: see above.

    Raises:
        ValueError: progress is not in [0, 1], not start < end, or temperature or floor is out of range.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1], got {progress}")
    if not start < end or not temperature > 0 or not 0 <= floor < 0.5:
        raise ValueError(
            f"need start < end, temperature > 0 and floor in [0, 0.5), got {start}, {end}, {temperature}, {floor}"
        )
    exponent = temperature * (progress - 0.5 * (start + end)) / (end - start)
    # tanh does not overflow where exp would.
    alpha = 0.5 * (1 - math.tanh(0.5 * exponent))
    if alpha < floor:
        return 0.0
    return 1.0 if alpha > 1 - floor else alpha


def _require_alpha(alpha: float) -> None:
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}; at 0 take meanflow_loss")


def alphaflow_step(data: DataBatch, pair: TimePair, networks: Networks, settings: AlphaflowConfig) -> ConsistencyStep:
    """AlphaFlow on one batch: no derivative and one more call of the student, until alpha is 0 and it is MeanFlow.

    Raises:
        ValueError: some r exceeds its t.
    """
    batch = flow_batch(data, pair, networks, settings, guide=folded_guide(networks.guidance, settings))
    alpha = alpha_schedule(data.progress, start=settings.alpha_start, end=settings.alpha_end)
    if alpha == 0:
        return derivative_form(batch, networks, settings)
    t, r = pair.t, pair.r
    x_s, s = alphaflow_state(batch.x_t, batch.velocity, t, r, alpha=alpha)
    ahead = batch.velocity
    if alpha < 1:
        with torch.no_grad():
            ahead = networks.student(x_s, s, batch.condition, r)
    target = alphaflow_target(batch.velocity, ahead, alpha=alpha)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    found = alphaflow_loss(prediction, target, alpha=alpha, constant=settings.constant)
    record = flow_record(found, pair, None)
    return ConsistencyStep(found.loss, {**record, "alpha": found.loss.new_tensor(alpha)})
