"""What the student minimises on one batch of noised data. Networks are called here, arithmetic is in the loss files.

Legend: B batch; x0, eps, x_t, x_tau [B, C, h, w]; t, tau [B], t in [0, 1] with noise at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.consistency.batch import ConsistencyTurn, Networks, Noised
from fewstep.consistency.config import FLOW_MAPS, ConsistencyLossConfig
from fewstep.consistency.discrete_loss import (
    consistency_distillation_loss,
    ect_weight,
    pseudo_huber_loss,
    shared_noise_states,
    teacher_step,
)
from fewstep.consistency.flow_turns import draw_pair, flow_map_turn
from fewstep.consistency.scm_loss import (
    ConsistencyLoss,
    Tangent,
    flow_tangent,
    normalise_tangent,
    scm_loss,
    tangent_warmup,
    trig_tangent,
)
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.times import TimePair, ect_times, grid_times
from fewstep.consistency.trigflow import VelocityFunction, to_trig_state, trig_from_velocity, trig_function
from fewstep.core.paths import add_noise, expand_time, x0_from_velocity
from fewstep.dmd.turns import Draw


def consistency_turn(
    noised: Noised,
    networks: Networks,
    *,
    draw: Draw,
    loss: ConsistencyLossConfig,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ConsistencyTurn:
    """The loss that is configured, on one batch. `mean_over_processes` averages a tensor over the run's processes."""
    if loss.objective in FLOW_MAPS:
        pair = draw_pair(noised, draw, loss)
        return flow_map_turn(noised, pair, networks, draw=draw, loss=loss, mean_over_processes=mean_over_processes)
    if loss.objective == "dcm":
        uniform = draw.uniform("consistency_grid")
        return dcm_turn(noised, networks, grid_times(uniform, steps=loss.grid_steps, shift=loss.grid_shift))
    if loss.objective == "ect":
        return ect_turn(noised, networks, loss)
    return scm_turn(noised, networks, loss)


def dcm_turn(noised: Noised, networks: Networks, times: TimePair) -> ConsistencyTurn:
    """Discrete consistency distillation: the student's x0 before and after one Euler step of the teacher's grid."""
    prediction, target = distilled_pair(noised, networks, times)
    found = consistency_distillation_loss(prediction, target)
    return ConsistencyTurn(found.loss, {"isolated_samples": found.isolated_count.float()})


def distilled_pair(noised: Noised, networks: Networks, times: TimePair) -> tuple[Tensor, Tensor]:
    """The student's x0 at the t of `times`, with graph, and at their r after one Euler step of the teacher, without."""
    x_t, condition = add_noise(noised.x0, noised.eps, times.t), noised.condition
    velocity = networks.teacher_velocity(x_t, times.t, condition)
    x_r = teacher_step(x_t, velocity, times.t, times.r)
    with torch.no_grad():
        target = x0_from_velocity(x_r, networks.student(x_r, times.r, condition), times.r)
    return x0_from_velocity(x_t, networks.wrapped(x_t, times.t, condition), times.t), target


def ect_turn(noised: Noised, networks: Networks, loss: ConsistencyLossConfig) -> ConsistencyTurn:
    """Consistency training without a teacher (ECT, arXiv:2406.14548): both states from the same data and noise."""
    stage = noised.step // loss.ect_stage_steps
    # At t = 1 the noise-to-signal ratio is infinite, and so are the method's weights.
    times = ect_times(noised.t.clamp(max=loss.ect_largest_time), stage=stage, q=loss.ect_q)
    x_t, x_r = shared_noise_states(noised.x0, noised.eps, times.t, times.r)
    with torch.no_grad():
        target = x0_from_velocity(x_r, networks.student(x_r, times.r, noised.condition), times.r)
    prediction = x0_from_velocity(x_t, networks.wrapped(x_t, times.t, noised.condition), times.t)
    weight = ect_weight(times.t, times.r, sigma_data=1.0)
    found = pseudo_huber_loss(prediction, target, constant=loss.huber, weight=weight)
    return ConsistencyTurn(found.loss, {"isolated_samples": found.isolated_count.float()})


def scm_turn(noised: Noised, networks: Networks, loss: ConsistencyLossConfig) -> ConsistencyTurn:
    """Continuous-time consistency (arXiv:2410.11081, Alg. 1): one tangent without graph, one forward with.

    What the tangent is compared with is the output of the gradient's own forward, so that a difference between the two
    calls cannot enter F - F.
    """
    x_t, t = noised.x_t, noised.t
    target = networks.teacher_velocity(x_t, t, noised.condition)
    velocity = networks.wrapped(x_t, t, noised.condition)
    direction_of = trig_direction if loss.coordinates == "trigflow" else flow_direction
    output, tangent = direction_of(noised, networks.student, velocity, target, loss)
    log_weight = None if networks.time_weight is None else networks.time_weight(t)
    found = scm_loss(output, normalise_tangent(tangent.total, constant=loss.normalizer), log_weight=log_weight)
    record = tangent_record(tangent, found)
    if log_weight is not None:
        record["log_weight"] = log_weight.detach().mean()
    return ConsistencyTurn(found.loss, record)


def trig_direction(
    noised: Noised, student: nn.Module, velocity: Tensor, teacher_velocity: Tensor, loss: ConsistencyLossConfig
) -> tuple[Tensor, Tangent]:
    """(F with graph, its tangent) in TrigFlow's coordinates."""
    x_tau, tau = to_trig_state(noised.x_t, noised.t)
    network = trig_from_velocity(noised.x_t, velocity, tau)
    target = trig_from_velocity(noised.x_t, teacher_velocity, tau)
    # cos sin inside the tangents keeps every number of the network's tangent small.
    pace = torch.cos(tau) * torch.sin(tau)
    function = trig_function(lambda x_t, t: student(x_t, t, noised.condition))
    derivative = along(function, x_tau, tau, expand_time(pace, x_tau) * target, pace, loss, end=math.pi / 2)
    return network, trig_tangent(
        x_tau, network.detach(), target, derivative, tau, warmup=tangent_warmup(noised.step, loss.tangent_warmup)
    )


def flow_direction(
    noised: Noised, student: nn.Module, velocity: Tensor, teacher_velocity: Tensor, loss: ConsistencyLossConfig
) -> tuple[Tensor, Tangent]:
    """(velocity with graph, its tangent) in rectified flow's own coordinates."""
    x_t, t = noised.x_t, noised.t
    derivative = along(
        lambda x, time: student(x, time, noised.condition), x_t, t, teacher_velocity, torch.ones_like(t), loss, end=1.0
    )
    return velocity, flow_tangent(
        velocity.detach(), teacher_velocity, derivative, t, warmup=tangent_warmup(noised.step, loss.tangent_warmup)
    )


def along(
    function: VelocityFunction,
    x: Tensor,
    time: Tensor,
    dx: Tensor,
    dtime: Tensor,
    loss: ConsistencyLossConfig,
    *,
    end: float,
) -> Tensor:
    """The derivative along (dx, dtime), by the configured method; `end` is the largest time there is."""
    if loss.tangent == "jvp":
        return total_derivative(function, x, time, dx, dtime).derivative
    return central_derivative(function, x, time, dx, dtime, step=loss.central_step, interval=(0.0, end))


def tangent_record(tangent: Tangent, found: ConsistencyLoss) -> dict[str, Tensor]:
    """Lengths of the tangent and of its two parts, means over the batch, and how many samples were not finite."""
    lengths = {"tangent": tangent.total, "tangent_gap": tangent.gap, "tangent_drift": tangent.drift}
    record = {name: part.flatten(1).norm(dim=1).mean() for name, part in lengths.items()}
    return {**record, "isolated_samples": found.isolated_count.float()}
