"""Turns of networks with two times, u(x_t, t, r): MeanFlow and its relatives, and AnyFlow.

The velocity v~ that u averages is the guided teacher's (distillation), or that of the data, eps - x0, as the papers
have it; then guidance comes in through the student's own outputs. Networks are called here, arithmetic is in
`meanflow_loss.py`, `alphaflow_loss.py` and `flow_map_loss.py`.

Legend: B batch; x_t, v~ [B, C, h, w]; t, r [B], 0 <= r <= t <= 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.consistency.batch import Networks, Noised
from fewstep.consistency.config import ConsistencyLossConfig
from fewstep.consistency.sample_loss import ConsistencyLoss
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.times import TimePair, anyflow_times, logit_normal, ordered_times
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, at_least_fp32, expand_time
from fewstep.core.randomness import Draw
from fewstep.core.shapes import expand_weight, require_same_shape


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


def effective_guidance(omega: float, kappa: float) -> float:
    """omega / (1 - kappa): the guidance scale w of u + w (c - u) that `folded_velocity` teaches.

    Raises:
        ValueError: kappa is not below 1.
    """
    if not kappa < 1:
        raise ValueError(f"kappa must be below 1, got {kappa}: at 1 the velocity of the data would not enter")
    return omega / (1 - kappa)


@torch.no_grad()
def folded_velocity(
    velocity: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    t: Tensor,
    *,
    scales: tuple[float, float],
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """omega v + kappa u_c + (1 - omega - kappa) u_0: guidance inside the target (arXiv:2505.13447).

    At its fixed point u_c(x, t, t) is the velocity guided by `effective_guidance`. Use the result as the direction of
    the derivative too. Samples whose condition was dropped take `velocity` itself, which is the caller's to choose.

    Args:
        velocity: [B, ...] eps - x0.
        conditional: u(x, t, t) with the condition, of the current weights.
        unconditional: u(x, t, t) without it.
        t: [B].
        scales: (omega, kappa); the public code has (1, 0.5) for its small and (0.2, 0.92) for its largest network.
        interval: both ends belong to it; outside, `velocity` is returned ((0, 0.75) for the largest).

    Raises:
        ValueError: shapes differ, or kappa is not below 1.
    """
    require_same_shape(velocity=velocity, conditional=conditional, unconditional=unconditional)
    omega, kappa = scales
    effective_guidance(omega, kappa)
    velocity = at_least_fp32(velocity)
    rest = 1 - omega - kappa
    folded = omega * velocity + kappa * at_least_fp32(conditional) + rest * at_least_fp32(unconditional)
    time = expand_time(t, velocity)
    return torch.where((time >= interval[0]) & (time <= interval[1]), folded, velocity)


@torch.no_grad()
def improved_guided_velocity(velocity: Tensor, conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """v + (1 - 1/w) (v_c - v_0): the target of improved MeanFlow at guidance w [B], which its network is told.

    Its fixed point is v_c = v_0 + w (v - v_0). v_c and v_0 are the model's own, with and without condition.

    Raises:
        ValueError: shapes differ, or scale is not [B].
    """
    require_same_shape(velocity=velocity, conditional=conditional, unconditional=unconditional)
    share = 1 - 1 / expand_weight(scale, velocity)
    return at_least_fp32(velocity) + share * (at_least_fp32(conditional) - at_least_fp32(unconditional))
