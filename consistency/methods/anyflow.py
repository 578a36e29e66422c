"""Flow maps at any number of steps: AnyFlow's target, guidance and weights, and its backward simulation in three jumps.

    x_r = x_t - (t - r) u(x_t, t, r)

jumps from t to any r at once, so a sampler of K steps trained for one K works for all, and a state deep inside a long
rollout costs one jump. (AnyFlow, arXiv:2605.13724; target, guidance and weights follow its public code.)

Legend: B batch; states, velocities, u, derivative [B, ...]; t, r [B], 0 <= r <= t <= 1; `function` is
(x, t, r) -> u. Arithmetic in fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks
from fewstep.consistency.methods.flow_map import derivative_along, flow_batch, flow_record
from fewstep.consistency.sample_loss import ConsistencyLoss, finite_samples, keep_samples, reduce_sample
from fewstep.consistency.sections import AnyflowConfig, FlowMapConfig
from fewstep.consistency.times import TimePair
from fewstep.core.condition import Condition
from fewstep.core.grids import step_grid
from fewstep.core.paths import at_least_fp32, expand_time
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.shapes import require_same_shape
from fewstep.core.training.roles import Role

FlowMap = Callable[[Tensor, Tensor, Tensor], Tensor]
# Integral of t sqrt(1 - t) over [0, 1].
TIME_WEIGHT_MEAN = 4 / 15


@dataclass(frozen=True)
class Jump:
    """From t down to r < t; `trained` marks the segment that the student is trained on."""

    t: float
    r: float
    trained: bool


def flow_map_jump(x_t: Tensor, average_velocity: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r = x_t - (t - r) u, [B, ...].

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x_t=x_t, average_velocity=average_velocity)
    return at_least_fp32(x_t) - (expand_time(t, x_t) - expand_time(r, x_t)) * at_least_fp32(average_velocity)


@torch.no_grad()
def anyflow_target(velocity: Tensor, derivative: Tensor, t: Tensor, r: Tensor, *, guidance: float = 1.0) -> Tensor:
    """velocity - (t - r) du/dt / guidance, the target of `fuse_guidance`; `meanflow_target` for guidance 1.

    The public code takes the derivative as a central difference with a step of 0.005 along eps - x0, see
    `tangents.central_derivative`. Dividing by the guidance drops the derivative of the unconditional output and moves
    along the unguided velocity: an approximation of theirs, exact where r = t.

    Raises:
        ValueError: the shapes differ, or guidance is not positive.
    """
    require_same_shape(velocity=velocity, derivative=derivative)
    _require_guidance(guidance)
    gap = expand_time(t, velocity) - expand_time(r, velocity)
    return at_least_fp32(velocity) - gap * at_least_fp32(derivative) / guidance


def fuse_guidance(conditional: Tensor, unconditional: Tensor, *, guidance: float) -> Tensor:
    """(u_c - (1 - w) stop(u_0)) / w, which is regressed to the unguided target.

    At the fixed point u_c = u_0 + w (target - u_0), guidance w in the convention of this toolkit. Only `conditional`
    receives a gradient.

    Raises:
        ValueError: the shapes differ, or guidance is not positive.
    """
    require_same_shape(conditional=conditional, unconditional=unconditional)
    _require_guidance(guidance)
    return (at_least_fp32(conditional) - (1 - guidance) * at_least_fp32(unconditional.detach())) / guidance


def time_weight(t: Tensor) -> Tensor:
    """t sqrt(1 - t) / (4/15): mean 1 over uniform t, [B]. The division by that mean is our reading of the code.

    It vanishes at t = 0, and at t = 1, where a network with this weight alone is not trained.
    """
    t = at_least_fp32(t)
    return t * (1 - t).clamp(min=0).sqrt() / TIME_WEIGHT_MEAN


def match_scale(error: Tensor, equal: Tensor, *, reference: Tensor | None = None, floor: float = 1e-5) -> Tensor:
    """Errors [B] of which those with r != t are rescaled to the size of the flow-matching ones, r = t.

    Each is multiplied by stop(reference / (error + floor)): its gradient keeps its direction, and its value becomes
    nearly the reference.

    Args:
        error: [B] error of each sample, with graph.
        equal: bool [B], `TimePair.equal`.
        reference: 0-dim, the mean error of the samples with r = t over all processes; None is that of this batch.
        floor: keeps the factor finite.

    Raises:
        ValueError: shapes differ, or no sample has r = t and no reference is given.
    """
    require_same_shape(error=error, equal=equal)
    error = at_least_fp32(error)
    if reference is None:
        if not bool(equal.any()):
            raise ValueError("no sample of this batch has r = t; give the mean over all processes as reference")
        reference = error.detach()[equal].mean()
    factor = (at_least_fp32(reference) / (error + floor)).detach()
    return torch.where(equal, error, factor * error)


def backward_simulation(steps: int, segment: int, *, shift: float = 1.0) -> tuple[Jump, ...]:
    """At most three jumps that give the state of a rollout of `steps` steps, whatever `steps` is.

    noise -> t_k, then the trained segment t_k -> t_(k+1), then t_(k+1) -> 0; jumps of length zero are left out. An
    exact flow map makes them equal to the rollout of all steps.

    Args:
        steps: N, length of the rollout that is imitated.
        segment: k in 0 ... N - 1, which segment is trained; the same on all processes.
        shift: of the grid.

    Raises:
        ValueError: there is no such segment, or the grid does not exist.
    """
    grid = (*step_grid(steps, shift=shift), 0.0)
    if not 0 <= segment < steps:
        raise ValueError(f"segment must be from 0 to {steps - 1}, got {segment}")
    t, r = grid[segment], grid[segment + 1]
    jumps = (Jump(grid[0], t, False), Jump(t, r, True), Jump(r, 0.0, False))
    return tuple(jump for jump in jumps if jump.t > jump.r)


def simulate(
    function: FlowMap, noise: Tensor, jumps: Sequence[Jump], *, frozen_function: FlowMap | None = None
) -> Tensor:
    """The state at the end of the jumps, [B, ...]; `noise` is the state at the t of the first.

    Jumps before the trained one have no graph. Those after it carry the gradient of their end through their state.

    Args:
        function: the student.
        noise: [B, ...].
        jumps: of `backward_simulation`.
        frozen_function: the student with weights that take no gradient, for every jump but the trained one; None is
            `function`, whose weights then also learn from the jumps after the trained one.

    Raises:
        ValueError: there are no jumps, or they do not join.
    """
    if len(jumps) == 0:
        raise ValueError("give at least one jump, such as backward_simulation(4, 0)")
    for before, after in pairwise(jumps):
        if before.r != after.t:
            raise ValueError(f"jumps do not join: one ends at {before.r}, the next starts at {after.t}")
    x, reached = at_least_fp32(noise), False
    for jump in jumps:
        reached = reached or jump.trained
        called = function if jump.trained or frozen_function is None else frozen_function
        with torch.set_grad_enabled(torch.is_grad_enabled() and reached):
            x = _jump(called, x, jump.t, jump.r)
    return x


def _jump(function: FlowMap, x: Tensor, t: float, r: float) -> Tensor:
    start, end = (torch.full((len(x),), value, dtype=x.dtype, device=x.device) for value in (t, r))
    return flow_map_jump(x, function(x, start, end), start, end)


def _require_guidance(guidance: float) -> None:
    if not guidance > 0:
        raise ValueError(f"guidance must be positive, got {guidance}; 1 is no guidance")


def anyflow_step(
    data: DataBatch,
    pair: TimePair,
    networks: Networks,
    settings: FlowMapConfig,
    *,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ConsistencyStep:
    """AnyFlow's first stage (arXiv:2605.13724): samples with r < t are brought to the size of those with r = t.

    That size is the flow-matching error against the data, also where the target is the teacher's velocity (which the
    student begins at, so that its own error there says nothing). The time weight is applied before, so samples with
    r < t lose it again: our reading of the public code.

    Raises:
        ValueError: some r exceeds its t, or no sample of the run's batch has r = t.
    """
    batch = flow_batch(data, pair, networks, settings, guide=None)
    t, r = pair.t, pair.r
    guidance = 1.0 if settings.velocity == "teacher" else networks.guidance
    derivative = derivative_along(batch, networks, batch.velocity, settings)
    target = anyflow_target(batch.velocity, derivative, t, r, guidance=guidance)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    if guidance != 1:
        with torch.no_grad():
            null = networks.teacher.null_condition.expand(len(t)).of_same_samples(batch.condition)
            unconditional = networks.student(batch.x_t, t, null, r)
        prediction = fuse_guidance(prediction, unconditional, guidance=guidance)
    usable = finite_samples(prediction, target)
    error = reduce_sample(keep_samples(prediction - target, usable).square(), "mean")
    weight, equal = time_weight(t), pair.equal
    with torch.no_grad():
        to_data = keep_samples(prediction - (data.eps - data.x0), usable)
        distance = weight * reduce_sample(to_data.square(), "mean")
        sums = torch.stack([(distance * equal).sum(), (equal & usable).to(distance).sum()])
        total, count = mean_over_processes(sums).unbind()
    if not count > 0:
        raise ValueError(
            "no sample of this batch has r = t, whose error sets the scale of the others: use pairs 'partition' "
            "with slices (run.batch_size / gradient_accumulation) of at least 4, or a larger equal_share"
        )
    matched = match_scale(weight * error, equal, reference=total / count)
    found = ConsistencyLoss(matched.mean(), error.detach(), ~usable)
    return ConsistencyStep(found.loss, {**flow_record(found, pair, derivative), "flow_scale": total / count})


def rollout_samples(
    student: Role,
    frozen_student: nn.Module,
    condition: Condition,
    settings: AnyflowConfig,
    *,
    draw: Draw,
    shape: tuple[int, ...],
    shift: float,
    step: int,
) -> Tensor:
    """x0 [B, C, h, w] at the end of a rollout of a random number of steps, in three jumps at most: the second stage.

    `frozen_student` is the student with the same weights and without gradients. A random segment of the rollout is
    trained; the jumps after it carry the gradient and do not learn from it, which is one forward with a graph for the
    weights whatever the length. With `rollout_learns: all` it learns from all three, as in the public code. Number of
    steps and segment are drawn from (seed, step) alone, so all processes build the same graph.
    """
    choices, seed = settings.rollout_steps, draw.seed
    steps = choices[shared_integer(seed, step, "rollout_steps", len(choices))]
    segment = shared_integer(seed, step, "rollout_segment", steps)
    # The distributed wrapper is for calls whose gradients are averaged; the others go to the bare network.
    trained = student.wrapped if torch.is_grad_enabled() else student.module

    def jump(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return trained(x_t, t, condition, r)

    def frozen_jump(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        # The same weights without gradients: a freeze that ended here would not hold when blocks are computed again.
        return frozen_student(x_t, t, condition, r)

    jumps = backward_simulation(steps, segment, shift=shift)
    noise = draw.noise(shape, "noise")
    if settings.rollout_learns == "all":
        return simulate(jump, noise, [replace(each, trained=True) for each in jumps])
    return simulate(jump, noise, jumps, frozen_function=frozen_jump)
