"""Turns of networks with two times, u(x_t, t, r): MeanFlow and its relatives, and AnyFlow.

The velocity v~ that u averages is the guided teacher's (distillation), or that of the data, eps - x0, as the papers
have it; then guidance comes in through the student's own outputs. Networks are called here, arithmetic is in
`meanflow_loss.py`, `alphaflow_loss.py` and `flow_map_loss.py`.

Legend: B batch; x_t, v~ [B, C, h, w]; t, r [B], 0 <= r <= t <= 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.consistency.alphaflow_loss import alpha_schedule, alphaflow_loss, alphaflow_state, alphaflow_target
from fewstep.consistency.batch import ConsistencyTurn, Networks, Noised
from fewstep.consistency.config import ConsistencyLossConfig
from fewstep.consistency.flow_map_loss import anyflow_target, fuse_guidance, match_scale, time_weight
from fewstep.consistency.meanflow_loss import (
    cauchy_loss,
    folded_velocity,
    improved_guided_velocity,
    improved_prediction,
    meanflow_loss,
    meanflow_target,
)
from fewstep.consistency.scm_loss import ConsistencyLoss, finite_samples, keep_samples, reduce_sample
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.times import TimePair, anyflow_times, logit_normal, ordered_times
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise
from fewstep.dmd.turns import Draw


@dataclass(frozen=True)
class FlowBatch:
    """Where a flow map is trained: states at t, to be carried to r along `velocity`, v~."""

    x_t: Tensor
    pair: TimePair
    velocity: Tensor
    condition: Condition


def draw_pair(noised: Noised, draw: Draw, loss: ConsistencyLossConfig) -> TimePair:
    """Random (t, r) of a batch; 'ordered' takes the time that the data were given as one of its two."""
    if loss.pairs == "partition":
        first, second = draw.uniform("flow_first_time"), draw.uniform("flow_second_time")
        return anyflow_times(first, second, torch.tensor(draw.indices, device=draw.device), shift=loss.pair_shift)
    second = logit_normal(draw.noise((), "flow_second_time"), mean=loss.time_mean, std=loss.time_std)
    return ordered_times(noised.t, second, draw.uniform("flow_equal_times"), equal_share=loss.equal_share)


def flow_map_turn(
    noised: Noised,
    pair: TimePair,
    networks: Networks,
    *,
    draw: Draw,
    loss: ConsistencyLossConfig,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ConsistencyTurn:
    """The loss of the configured flow map on one batch, noised to the t of `pair`.

    Raises:
        ValueError: some r exceeds its t, or AnyFlow finds no sample with r = t.
    """
    if bool((pair.r > pair.t).any()):
        raise ValueError("a flow map goes from t down to r: give pairs with r <= t (0 is data, 1 is noise)")
    batch = flow_batch(noised, pair, networks, draw=draw, loss=loss)
    if loss.objective == "anyflow":
        return anyflow_turn(batch, networks, loss, data=noised.eps - noised.x0, mean=mean_over_processes)
    if loss.objective == "alphaflow":
        alpha = alpha_schedule(noised.progress, start=loss.alpha_start, end=loss.alpha_end)
        if alpha > 0:
            return alphaflow_turn(batch, networks, loss, alpha=alpha)
    return meanflow_turn(batch, networks, loss)


def flow_batch(
    noised: Noised, pair: TimePair, networks: Networks, *, draw: Draw, loss: ConsistencyLossConfig
) -> FlowBatch:
    """States, v~ and conditions of one batch; where guidance comes from the student, some conditions are dropped."""
    x_t, condition = add_noise(noised.x0, noised.eps, pair.t), noised.condition
    if loss.velocity == "teacher":
        return FlowBatch(x_t, pair, networks.teacher_velocity(x_t, pair.t, condition), condition)
    velocity = noised.eps - noised.x0
    if networks.guidance == 1:
        return FlowBatch(x_t, pair, velocity, condition)
    kept = draw.uniform("flow_condition_drop") >= loss.condition_drop
    null = networks.teacher.null_condition
    if loss.objective != "anyflow":
        guided = own_guided_velocity(x_t, pair.t, velocity, condition, networks, loss)
        velocity = torch.where(kept.view(-1, *([1] * (velocity.ndim - 1))), guided, velocity)
    return FlowBatch(x_t, pair, velocity, condition.where(kept, null))


@torch.no_grad()
def own_guided_velocity(
    x_t: Tensor,
    t: Tensor,
    velocity: Tensor,
    condition: Condition,
    networks: Networks,
    loss: ConsistencyLossConfig,
) -> Tensor:
    """The velocity of the data guided by the student's current u(x, t, t) with and without condition.

    The scale that is learnt is teacher.guidance. Improved MeanFlow's random scale, told to its network, is one fixed
    scale here.
    """
    conditional = networks.student(x_t, t, condition)
    unconditional = networks.student(x_t, t, networks.teacher.null_condition.expand(len(t)))
    if loss.objective == "imf":
        scale = torch.full_like(t, networks.guidance)
        return improved_guided_velocity(velocity, conditional, unconditional, scale)
    scales = (networks.guidance * (1 - loss.kappa), loss.kappa)
    return folded_velocity(velocity, conditional, unconditional, t, scales=scales, interval=loss.guidance_interval)


def meanflow_turn(batch: FlowBatch, networks: Networks, loss: ConsistencyLossConfig) -> ConsistencyTurn:
    """MeanFlow (arXiv:2505.13447); for 'imf' improved, for 'dmf' with the loss of decoupled MeanFlow.

    Improved MeanFlow's direction is the model's own velocity, and its V is regressed to v~.
    """
    t, r = batch.pair.t, batch.pair.r
    direction = batch.velocity
    if loss.objective == "imf":
        with torch.no_grad():
            direction = networks.student(batch.x_t, t, batch.condition)
    derivative = derivative_along(batch, networks, direction, loss)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    if loss.objective == "imf":
        improved = improved_prediction(prediction, derivative, t, r)
        found = meanflow_loss(improved, batch.velocity, power=loss.power, constant=loss.constant)
    else:
        target = meanflow_target(batch.velocity, derivative, t, r)
        if loss.objective == "dmf":
            found = cauchy_loss(prediction, target, constant=loss.constant)
        else:
            found = meanflow_loss(prediction, target, power=loss.power, constant=loss.constant)
    return ConsistencyTurn(found.loss, flow_record(found, batch.pair, derivative))


def alphaflow_turn(
    batch: FlowBatch, networks: Networks, loss: ConsistencyLossConfig, *, alpha: float
) -> ConsistencyTurn:
    """AlphaFlow before its end, where it becomes `meanflow_turn`: no derivative, one more call of the student."""
    t, r = batch.pair.t, batch.pair.r
    x_s, s = alphaflow_state(batch.x_t, batch.velocity, t, r, alpha=alpha)
    ahead = batch.velocity
    if alpha < 1:
        with torch.no_grad():
            ahead = networks.student(x_s, s, batch.condition, r)
    target = alphaflow_target(batch.velocity, ahead, alpha=alpha)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    found = alphaflow_loss(prediction, target, alpha=alpha, constant=loss.constant)
    record = flow_record(found, batch.pair, None)
    return ConsistencyTurn(found.loss, {**record, "alpha": found.loss.new_tensor(alpha)})


def anyflow_turn(
    batch: FlowBatch,
    networks: Networks,
    loss: ConsistencyLossConfig,
    *,
    data: Tensor,
    mean: Callable[[Tensor], Tensor],
) -> ConsistencyTurn:
    """AnyFlow's first stage (arXiv:2605.13724): samples with r < t are brought to the size of those with r = t.

    That size is the flow-matching error against the data, also where the target is the teacher's velocity (which the
    student begins at, so that its own error there says nothing). The time weight is applied before, so samples with
    r < t lose it again: our reading of the public code. `data` is eps - x0; `mean` averages over processes.
    """
    t, r = batch.pair.t, batch.pair.r
    guidance = 1.0 if loss.velocity == "teacher" else networks.guidance
    derivative = derivative_along(batch, networks, batch.velocity, loss)
    target = anyflow_target(batch.velocity, derivative, t, r, guidance=guidance)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    if guidance != 1:
        with torch.no_grad():
            null = networks.teacher.null_condition.expand(len(t))
            unconditional = networks.student(batch.x_t, t, null, r)
        prediction = fuse_guidance(prediction, unconditional, guidance=guidance)
    usable = finite_samples(prediction, target)
    error = reduce_sample(keep_samples(prediction - target, usable).square(), "mean")
    weight, equal = time_weight(t), batch.pair.equal
    with torch.no_grad():
        distance = weight * reduce_sample(keep_samples(prediction - data, usable).square(), "mean")
        total, count = mean(torch.stack([(distance * equal).sum(), (equal & usable).to(distance).sum()])).unbind()
    if not count > 0:
        raise ValueError(
            "no sample of this batch has r = t, whose error sets the scale of the others: use loss.pairs 'partition' "
            "with slices (run.batch_size / gradient_accumulation) of at least 4, or a larger loss.equal_share"
        )
    matched = match_scale(weight * error, equal, reference=total / count)
    found = ConsistencyLoss(matched.mean(), error.detach(), ~usable)
    return ConsistencyTurn(found.loss, {**flow_record(found, batch.pair, derivative), "flow_scale": total / count})


def derivative_along(batch: FlowBatch, networks: Networks, direction: Tensor, loss: ConsistencyLossConfig) -> Tensor:
    """du/dt along (direction, 1, 0) [B, ...], without graph; where r = t it has no weight and is 0, not computed."""
    t, r = batch.pair.t, batch.pair.r
    rows = (r < t).nonzero().flatten()
    derivative = torch.zeros_like(batch.x_t)
    if len(rows) == 0:
        return derivative
    condition = batch.condition.index(rows)

    def function(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return networks.student(x, start, condition, end)

    x, times, moved = batch.x_t[rows], (t[rows], r[rows]), direction[rows]
    pace = (torch.ones_like(times[0]), torch.zeros_like(times[1]))
    if loss.tangent == "jvp":
        found = total_derivative(function, x, times, moved, pace).derivative
    else:
        found = central_derivative(function, x, times, moved, pace, step=loss.central_step, interval=(0.0, 1.0))
    return derivative.index_copy(0, rows, found.to(derivative))


def flow_record(found: ConsistencyLoss, pair: TimePair, derivative: Tensor | None) -> dict[str, Tensor]:
    """The error of samples with r = t and with r < t, 0 where there are none, and the length of (t - r) du/dt."""
    equal = pair.equal.to(found.error)
    record = {
        "flow_error_equal": (found.error * equal).sum() / equal.sum().clamp(min=1),
        "flow_error_apart": (found.error * (1 - equal)).sum() / (1 - equal).sum().clamp(min=1),
        "isolated_samples": found.isolated_count.float(),
    }
    if derivative is not None:
        gap = (pair.t - pair.r) * derivative.flatten(1).norm(dim=1)
        record["tangent_drift"] = gap.sum() / (1 - equal).sum().clamp(min=1)
    return record
