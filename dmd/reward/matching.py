"""Distribution matching in a reward run: what the student and the fake score minimise on one slice.

Networks are called here, arithmetic is in the loss files. Legend: n samples of one slice; states, velocities, x0 [n, C,
h, w]; t [n].
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, eps_from_velocity, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.settings import TimeLawConfig
from fewstep.core.time_law import draw_times, unclamped_times
from fewstep.dmd.loss import distribution_matching_loss, matching_statistics
from fewstep.dmd.matching import drawn_guidance, fake_score_step
from fewstep.dmd.reward.chain import Loss, Prepared, Rollout, Velocities, transition
from fewstep.dmd.reward.config import AmbientConfig, RewardMatchingConfig, RewardRunConfig
from fewstep.dmd.reward.methods.ac_dmd import (
    add_subinterval_noise,
    ambient_fake_score_loss,
    consistency_regulariser,
    reverse_move,
    sample_subinterval_times,
    subinterval_matching_loss,
)
from fewstep.dmd.reward.setup import RewardSetup


@dataclass(frozen=True, eq=False)
class ComparedScores:
    """The student's prediction x0 (with graph), and those of fake score and teacher at the same x_t of time t."""

    x0: Tensor
    fake_x0: Tensor
    real_x0: Tensor
    x_t: Tensor
    t: Tensor

    @property
    def record(self) -> dict[str, Tensor]:
        """Metrics by name."""
        statistics = matching_statistics(self.x0, self.fake_x0, self.real_x0)
        return {f"matching_{field.name}": getattr(statistics, field.name) for field in fields(statistics)}


@dataclass(frozen=True, eq=False)
class Matched:
    """The matching loss without its weight, and what to log; `scores` is None where a noisy state was matched."""

    loss: Tensor
    record: dict[str, Tensor]
    scores: ComparedScores | None


def matching_term(
    config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, prepared: Prepared, velocities: Velocities
) -> Loss:
    """The matching loss with its weight; zero where the plan matches nothing."""
    if rollout.plan.matching_step is None:
        return rollout.x0.new_zeros(()), {}
    matched = match_call(config, setup, rollout, velocities, draw=prepared.draw)
    return require_matching(config).weight * matched.loss, matched.record


def match_call(
    config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, velocities: Velocities, *, draw: Draw
) -> Matched:
    """Distribution matching of the plan's call: on its prediction x0, or ambient."""
    matching = require_matching(config)
    if matching.ambient is not None:
        return ambient_matching(config, setup, rollout, velocities, ambient=matching.ambient, draw=draw)
    scores = compare_scores(config, setup, rollout, velocities, draw=draw)
    return Matched(distribution_matching_loss(scores.x0, scores.fake_x0, scores.real_x0), scores.record, scores)


def compare_scores(
    config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, velocities: Velocities, *, draw: Draw
) -> ComparedScores:
    """Both scores at the freshly noised prediction of the plan's call."""
    matching, j = require_matching(config), rollout.plan.matching_step
    assert j is not None
    assert setup.fake_score is not None
    velocity = velocities[j]
    time = torch.full((len(velocity),), setup.student.times[j], device=velocity.device)
    x0 = x0_from_velocity(rollout.states[j], velocity, time)
    with torch.no_grad():
        t = draw_times(draw, "score_time", matching.score_times, setup.teacher.family)
        x_t = add_noise(x0.detach(), draw.noise(setup.latent_shape, "score_noise"), t)
        fake_x0 = x0_from_velocity(x_t, setup.fake_score(x_t, t, rollout.condition).velocity, t)
        real_x0 = setup.teacher.x0(x_t, t, rollout.condition, drawn_guidance(matching, config.teacher, draw))
    return ComparedScores(x0, fake_x0, real_x0, x_t, t)


def ambient_matching(
    config: RewardRunConfig,
    setup: RewardSetup,
    rollout: Rollout,
    velocities: Velocities,
    *,
    ambient: AmbientConfig,
    draw: Draw,
) -> Matched:
    """AC-DMD at the state to which the plan's call led, with the noise of the rollout: only the student has a graph."""
    matching, j, times = require_matching(config), rollout.plan.matching_step, setup.student.times
    assert j is not None
    assert setup.fake_score is not None
    velocity, is_last = velocities[j], j == len(times) - 1
    s = torch.full((len(velocity),), 0.0 if is_last else times[j + 1], device=velocity.device)
    now = torch.full_like(s, times[j])
    if is_last:
        x_s = x0_from_velocity(rollout.states[j], velocity, now)
    else:
        x_s = transition(config, rollout.states[j], velocity, times, j).draw(rollout.noises[j])
    with torch.no_grad():
        t = ambient_times(matching.score_times, draw.uniform("score_time"), s)
        x_t = add_subinterval_noise(x_s.detach(), draw.noise(setup.latent_shape, "score_noise"), s, t)
        fake = setup.fake_score(x_t, t, rollout.condition).velocity
        real = setup.teacher.velocity(x_t, t, rollout.condition, drawn_guidance(matching, config.teacher, draw))
    noise = draw.noise(setup.latent_shape, "score_step_noise")
    loss = subinterval_matching_loss(x_s, x_t, fake, real, (s, t), eta=ambient.eta, noise=noise)
    record = {
        "matching_direction_rms": (fake - real).square().mean().sqrt(),
        "matching_student_mean": rollout.x0.mean(),
        "matching_student_std": rollout.x0.std(),
    }
    fake_x0, real_x0 = x0_from_velocity(x_t, fake, t), x0_from_velocity(x_t, real, t)
    return Matched(loss, record, ComparedScores(x_s, fake_x0, real_x0, x_t, t) if is_last else None)


def ambient_times(law: TimeLawConfig, u: Tensor, s: Tensor) -> Tensor:
    """Times [n] above s: the law's place between 0 and 1 is that between s and 1, clamped to the law's ends."""
    return sample_subinterval_times(unclamped_times(u, law), s, t_min=law.min, t_max=law.max)


def fake_step(config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, *, draw: Draw) -> Loss:
    """The fake score's loss on what the plan's call led to, and what to log."""
    matching, j = require_matching(config), rollout.plan.fake_step
    assert setup.fake_role is not None
    if matching.ambient is not None:
        return ambient_fake_step(matching, matching.ambient, setup, rollout, draw=draw)
    step = fake_score_step(
        rollout.predictions[j],
        rollout.condition,
        fake_score=setup.fake_role.wrapped,
        draw=draw,
        times=matching,
        clock=setup.teacher.family,
    )
    return step.loss, {"fake_score_loss": step.loss.detach()}


def ambient_fake_step(
    matching: RewardMatchingConfig, ambient: AmbientConfig, setup: RewardSetup, rollout: Rollout, *, draw: Draw
) -> Loss:
    """AC-DMD's loss of the fake score above the level at which the call's step ended, with its regulariser."""
    assert setup.fake_role is not None
    network, j = setup.fake_role.wrapped, rollout.plan.fake_step
    is_last = j == len(setup.student.times) - 1
    x_s = rollout.predictions[j] if is_last else rollout.next_states[j]
    s = torch.full((len(x_s),), 0.0 if is_last else setup.student.times[j + 1], device=x_s.device)
    t = ambient_times(matching.fake_times, draw.uniform("fake_time"), s)
    noise = draw.noise(setup.latent_shape, "fake_noise")
    x_t = add_subinterval_noise(x_s, noise, s, t)
    if ambient.consistency_weight == 0:
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
    return loss + ambient.consistency_weight * regulariser, record


def require_matching(config: RewardRunConfig) -> RewardMatchingConfig:
    """The section, in runs that match."""
    assert config.matching is not None
    return config.matching
