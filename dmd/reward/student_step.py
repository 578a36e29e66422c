"""What the student and the fake score minimise on one slice of a reward run, whatever the method.

All states that the student is called on are joined into one call of the (distributed) network; the losses are in
`dmd/reward/`. Legend: n samples of one slice; states, velocities, x0 [n, C, h, w]; t [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, eps_from_velocity, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.dmd.loss import distribution_matching_loss, matching_statistics
from fewstep.dmd.matching import fake_score_turn
from fewstep.dmd.reward.chain import Plan, Rollout
from fewstep.dmd.reward.config import FORWARD_METHODS, RewardRunConfig
from fewstep.dmd.reward.methods.ac_dmd import (
    add_subinterval_noise,
    ambient_fake_score_loss,
    ambient_matching,
    ambient_times,
    consistency_regulariser,
    reverse_move,
)
from fewstep.dmd.reward.methods.flash import pixel_gan_loss
from fewstep.dmd.reward.methods.forward import ForwardCall, forward_call, forward_loss
from fewstep.dmd.reward.methods.gndm import gndm_loss
from fewstep.dmd.reward.methods.redmd import weighted_matching
from fewstep.dmd.reward.methods.rtdmd import direct_reward_loss, tilt_record
from fewstep.dmd.reward.policy_step import policy_loss
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import RewardSetup


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a slice's losses need that no reward enters: the states of a forward method, with the older policy there."""

    forward: ForwardCall | None


@torch.no_grad()
def prepare(config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, plan: Plan, *, draw: Draw) -> Prepared:
    """Calls of snapshots, made while the reward is computed."""
    if config.method in FORWARD_METHODS and plan.judged:
        return Prepared(forward_call(config, setup, rollout, draw=draw))
    return Prepared(None)


def joined_velocities(
    network: nn.Module, calls: Sequence[tuple[Tensor, Tensor]], condition: Condition
) -> tuple[Tensor, ...]:
    """Velocities at each (x, t) [n, ...], [n] for one condition, by one call of the network."""
    states, times = torch.cat([x for x, _ in calls]), torch.cat([t for _, t in calls])
    return network(states, times, Condition.cat([condition] * len(calls))).split(condition.batch_size)


def student_turn(
    config: RewardRunConfig,
    setup: RewardSetup,
    rollout: Rollout,
    plan: Plan,
    *,
    rewards: SliceRewards | None,
    prepared: Prepared,
    draw: Draw,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's loss on one slice and what to log of it; `rewards` is None where nothing is decoded."""
    objective, times = config.objective, setup.student.times
    direct = rewards is not None and objective.direct_weight > 0
    steps = set(plan.policy_steps) | ({plan.last} if direct else set())
    steps |= {j for j in (plan.matching_step, plan.gan_step) if j is not None}
    order = sorted(steps)
    full = [torch.full((len(rollout.x0),), times[j], device=rollout.x0.device) for j in order]
    calls = [(rollout.states[j], t) for j, t in zip(order, full, strict=True)]
    if prepared.forward is not None:
        calls.append((prepared.forward.x_t, prepared.forward.t))
    velocities = joined_velocities(setup.student_role.wrapped, calls, rollout.condition)
    at = dict(zip(order, velocities, strict=False))
    loss, record = rollout.x0.new_zeros(()), {}
    if rewards is not None and prepared.forward is not None:
        term, record = forward_loss(config, prepared.forward, velocities[-1], rollout, rewards.advantages)
        loss = loss + objective.policy_weight * term
    if plan.policy_steps and (rewards is not None or rollout.judgements):
        chain = [at[j] for j in plan.policy_steps]
        term, record = policy_loss(config, setup, rollout, plan, velocities=chain, rewards=rewards, draw=draw)
        loss = loss + objective.policy_weight * term
    if plan.matching_step is not None:
        velocity = at[plan.matching_step]
        term, found = matching_loss(config, setup, rollout, plan, velocity=velocity, rewards=rewards, draw=draw)
        loss, record = loss + objective.matching_weight * term, {**record, **found}
    if plan.gan_step is not None:
        term, found = pixel_gan_loss(setup, rollout, plan.gan_step, velocity=at[plan.gan_step])
        loss, record = loss + config.pixel_gan.weight * term, {**record, **found}
    if direct:
        x0 = x0_from_velocity(rollout.states[plan.last], at[plan.last], full[-1])
        values = setup.reward.with_gradient(setup.teacher.decode(x0), rollout.prompts)
        term = direct_reward_loss(setup.reward.total(values), margin=objective.direct_margin)
        loss, record = loss + objective.direct_weight * term, {**record, "direct_loss": term.detach()}
    return loss, {"student_loss": loss.detach(), **record}


def matching_loss(
    config: RewardRunConfig,
    setup: RewardSetup,
    rollout: Rollout,
    plan: Plan,
    *,
    velocity: Tensor,
    rewards: SliceRewards | None,
    draw: Draw,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Distribution matching of one call's output, in the form of the method."""
    assert plan.matching_step is not None
    assert setup.fake_score is not None
    if config.objective.matching == "ambient":
        return ambient_matching(config, setup, rollout, plan.matching_step, velocity=velocity, draw=draw)
    j, loss = plan.matching_step, config.loss
    time = torch.full((len(velocity),), setup.student.times[j], device=velocity.device)
    x0 = x0_from_velocity(rollout.states[j], velocity, time)
    with torch.no_grad():
        t = draw.times("score_time", shift=loss.score_shift, interval=loss.interval)
        x_t = add_noise(x0.detach(), draw.noise(setup.latent_shape, "score_noise"), t)
        fake_x0 = x0_from_velocity(x_t, setup.fake_score(x_t, t, rollout.condition).velocity, t)
        real_x0 = setup.teacher.x0(x_t, t, rollout.condition, config.teacher.guidance)
    statistics = matching_statistics(x0, fake_x0, real_x0)
    record = {f"matching_{field.name}": getattr(statistics, field.name) for field in fields(statistics)}
    if config.method == "redmd" and rewards is not None:
        term, found = weighted_matching(config, setup, rollout, rewards, scores=(x0, fake_x0, real_x0))
        return term, {**record, **found}
    record |= tilt_record(config, setup, x0, real_x0, t=t)
    if config.method == "gndm":
        return gndm_loss(x0, fake_x0, real_x0, rollout.groups.groups.to(x0.device)), record
    return distribution_matching_loss(x0, fake_x0, real_x0), record


def fake_turn(
    config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, plan: Plan, *, draw: Draw
) -> tuple[Tensor, dict[str, Tensor]]:
    """The fake score's loss on what the matched call led to."""
    assert setup.fake_role is not None
    network, j = setup.fake_role.wrapped, plan.fake_step
    if config.objective.matching == "x0":
        turn = fake_score_turn(
            rollout.predictions[j], rollout.condition, fake_score=network, loss=config.loss, draw=draw
        )
        return turn.loss, {"fake_score_loss": turn.loss.detach()}
    is_last = j == len(setup.student.times) - 1
    x_s = rollout.predictions[j] if is_last else rollout.next_states[j]
    s = torch.full((len(x_s),), 0.0 if is_last else setup.student.times[j + 1], device=x_s.device)
    t = ambient_times(config, draw.uniform("fake_time"), s, shift=config.loss.fake_shift)
    noise = draw.noise(setup.latent_shape, "fake_noise")
    x_t = add_subinterval_noise(x_s, noise, s, t)
    if config.objective.consistency_weight == 0:
        velocity = network(x_t, t, rollout.condition).velocity
        loss = ambient_fake_score_loss(velocity, x_s, noise, s, t)
        return loss, {"fake_score_loss": loss.detach()}
    # Where the two moves lead depends on the prediction at x_t, which the joined call below makes again with its graph.
    with torch.no_grad():
        held = setup.fake_role.module(x_t, t, rollout.condition).velocity
        # A step of up to 0.2 down, as in the released code.
        below = torch.maximum(t - 0.2 * (1 - draw.uniform("consistency_time")), 0.05 * t)
        x0, eps = x0_from_velocity(x_t, held, t), eps_from_velocity(x_t, held, t)
        moves = [
            reverse_move(x0, eps, draw.noise(setup.latent_shape, f"consistency_noise_{k}"), t, below) for k in (0, 1)
        ]
    joined = Condition.cat([rollout.condition] * 3)
    output = network(torch.cat([x_t, *moves]), torch.cat([t, below, below]), joined).velocity
    velocity, *others = output.split(len(x_t))
    loss = ambient_fake_score_loss(velocity, x_s, noise, s, t)
    first, second = (x0_from_velocity(x, v, below) for x, v in zip(moves, others, strict=True))
    regulariser = consistency_regulariser(x0_from_velocity(x_t, velocity, t), first, second)
    record = {"fake_score_loss": loss.detach(), "consistency_loss": regulariser.detach()}
    return loss + config.objective.consistency_weight * regulariser, record
