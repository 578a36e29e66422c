"""What all networks of two times, u(x_t, t, r), are trained on: pairs of times, states, and the velocity v~.

u averages v~ from t down to r. v~ is the guided teacher's (distillation), or that of the data, eps - x0, as the papers
have it; then guidance comes in through the student's own outputs.

Legend: B batch; x_t, v~, u [B, C, h, w]; t, r [B], 0 <= r <= t <= 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from fewstep.consistency.batch import DataBatch, Networks, random_times
from fewstep.consistency.sample_loss import ConsistencyLoss
from fewstep.consistency.sections import FlowMapConfig, FoldedGuidanceConfig, TangentConfig
from fewstep.consistency.tangents import along
from fewstep.consistency.times import TimePair, anyflow_times, logit_normal, ordered_times
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, at_least_fp32, expand_time
from fewstep.core.shapes import require_same_shape

# (velocity of the data, u_c, u_0, t) -> v~, with u_c and u_0 the student's u(x, t, t) with and without condition.
Guide: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FlowBatch:
    """Where a flow map is trained: states at t, to be carried to r along `velocity`, v~."""

    x_t: Tensor
    pair: TimePair
    velocity: Tensor
    condition: Condition


def draw_pair(data: DataBatch, settings: FlowMapConfig) -> TimePair:
    """Random (t, r) for each sample."""
    draw = data.draw
    if settings.pairs == "partition":
        first, second = draw.uniform("flow_first_time"), draw.uniform("flow_second_time")
        return anyflow_times(first, second, torch.tensor(draw.indices, device=draw.device), shift=settings.pair_shift)
    second = logit_normal(draw.noise((), "flow_second_time"), mean=settings.time_mean, std=settings.time_std)
    return ordered_times(
        random_times(data, settings), second, draw.uniform("flow_equal_times"), equal_share=settings.equal_share
    )


def flow_batch(
    data: DataBatch, pair: TimePair, networks: Networks, settings: FlowMapConfig, *, guide: Guide | None
) -> FlowBatch:
    """States, v~ and conditions of one batch; where guidance comes from the student, some conditions are dropped.

    `guide` brings the guidance into the velocity of the data; with None that is left to the method's loss.

    Raises:
        ValueError: some r exceeds its t.
    """
    if bool((pair.r > pair.t).any()):
        raise ValueError("a flow map goes from t down to r: give pairs with r <= t (0 is data, 1 is noise)")
    x_t, condition = add_noise(data.x0, data.eps, pair.t), data.condition
    if settings.velocity == "teacher":
        return FlowBatch(x_t, pair, networks.teacher_velocity(x_t, pair.t, condition), condition)
    velocity = data.eps - data.x0
    if networks.guidance == 1:
        return FlowBatch(x_t, pair, velocity, condition)
    kept = data.draw.uniform("flow_condition_drop") >= settings.condition_drop
    null = networks.teacher.null_condition
    if guide is not None:
        guided = own_guided_velocity(x_t, pair.t, velocity, condition, networks, guide)
        velocity = torch.where(kept.view(-1, *([1] * (velocity.ndim - 1))), guided, velocity)
    return FlowBatch(x_t, pair, velocity, condition.where(kept, null))


@torch.no_grad()
def own_guided_velocity(
    x_t: Tensor, t: Tensor, velocity: Tensor, condition: Condition, networks: Networks, guide: Guide
) -> Tensor:
    """The velocity of the data guided by the student's current u(x, t, t) with and without condition."""
    conditional = networks.student(x_t, t, condition)
    null = networks.teacher.null_condition.expand(len(t))
    unconditional = networks.student(x_t, t, null.of_same_samples(condition))
    return guide(velocity, conditional, unconditional, t)


def folded_guide(guidance: float, settings: FoldedGuidanceConfig) -> Guide:
    """MeanFlow's way to guide the velocity of the data by `guidance`, whatever kappa is."""
    scales = (guidance * (1 - settings.kappa), settings.kappa)
    return partial(folded_velocity, scales=scales, interval=settings.guidance_interval)


def derivative_along(batch: FlowBatch, networks: Networks, direction: Tensor, settings: TangentConfig) -> Tensor:
    """du/dt along (direction, 1, 0) [B, ...], without graph; where r = t it has no weight and is 0, not computed."""
    t, r = batch.pair.t, batch.pair.r
    rows = (r < t).nonzero().flatten()
    derivative = torch.zeros_like(batch.x_t)
    if len(rows) == 0:
        return derivative
    condition, student = batch.condition.index(rows), networks.student_on(rows)

    def function(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return student(x, start, condition, end)

    times = (t[rows], r[rows])
    pace = (torch.ones_like(times[0]), torch.zeros_like(times[1]))
    found = along(function, batch.x_t[rows], times, direction[rows], pace, settings)
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
