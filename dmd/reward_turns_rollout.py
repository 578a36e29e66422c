"""Rollouts of a few-step policy with everything that a reward loss needs of them, and what each step does with them.

Legend: n samples of one slice; states, x0 [n, C, h, w]; K calls of the student at times t_0 > ... > t_{K-1}; the step
after call j < K - 1 is random and leads to t_{j+1}, the last call gives the sample itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.paths import x0_from_velocity
from fewstep.core.randomness import sample_uniform, shared_integer
from fewstep.dmd.groups import SampleGroups, group_samples
from fewstep.dmd.reward.euphonium import guided_transition, process_gradient, step_scale, unit_gradient
from fewstep.dmd.reward.flash_dmd import route_steps
from fewstep.dmd.reward.flow_sde import (
    Transition,
    cps_transition,
    distance_log_prob,
    flow_sde_diffusion,
    sde_transition,
    transition_log_prob,
)
from fewstep.dmd.reward.grpo import select_steps, transition_noise
from fewstep.dmd.reward_config import CHAIN_METHODS, ChainConfig, RewardRunConfig
from fewstep.dmd.reward_latent import LatentScorer, latent_scores
from fewstep.dmd.reward_setup import RewardSetup
from fewstep.dmd.reward_turns_scores import RewardError
from fewstep.dmd.turns import Draw


@dataclass(frozen=True)
class Plan:
    """What one step of the run does; a function of (seed, step), the same on all processes.

    Attributes:
        last: the last call of the rollout.
        matching_step: the call whose output is matched to the teacher, or None.
        policy_steps: random steps that get the policy loss.
        judged: whether samples are scored.
        shared_start: whether a group shares its noise up to the step of the preference.
        step: the number of the step.
        gan_step: the call whose decoded output the pixel discriminator sees, or None.
        followed_step: what the fake score is trained on where nothing is matched; None is the last call.
    """

    last: int
    matching_step: int | None
    policy_steps: tuple[int, ...]
    judged: bool
    shared_start: bool
    step: int
    gan_step: int | None = None
    followed_step: int | None = None

    @property
    def fake_step(self) -> int:
        """The call whose output the fake score is trained on."""
        if self.matching_step is not None:
            return self.matching_step
        return self.last if self.followed_step is None else self.followed_step


def make_plan(config: RewardRunConfig, step: int, *, times: Sequence[float]) -> Plan:
    """The plan of a step for a student that is called at these times.

    Matching draws one call as DMD2 does, or takes the last one; redmd ends its rollout there. SubGRPO draws its steps
    (`select_steps`).
    """
    objective, method, seed, calls = config.objective, config.method, config.run.seed, len(times)
    cold = step < objective.cold_start_steps
    any_step = shared_integer(seed, step, "matching_step", calls)
    if method == "flash":
        return flash_plan(config, step, times=times)
    matched: int | None = None
    if config.matches:
        matched = any_step if cold or objective.matching_steps == "any" else calls - 1
    if cold:
        return Plan(any_step, any_step, (), judged=False, shared_start=False, step=step)
    if method == "redmd":
        assert matched is not None
        return Plan(matched, matched, (), judged=True, shared_start=False, step=step)
    steps: tuple[int, ...] = ()
    if method in CHAIN_METHODS and objective.policy_weight > 0:
        u = sample_uniform(seed, [0], (calls - 1,), step=step, stream="policy_steps")[0]
        steps = select_steps(u, first=0, count=config.chain.trained_steps or calls - 1)
    return Plan(calls - 1, matched, steps, judged=True, shared_start=False, step=step)


def flash_plan(config: RewardRunConfig, step: int, *, times: Sequence[float]) -> Plan:
    """Flash-DMD: matching in one step, pairs in the next `updates_per_matching`; at first matching alone (stage 1).

    The pixel GAN trains one of the late calls in every step, in those of pairs, too: without it the paper's second
    stage collapses. With 'early' matching the others are matched, and the fake score follows them in every step.
    """
    objective, gan, seed, calls = config.objective, config.pixel_gan, config.run.seed, len(times)
    cold, followed, gan_step = step < objective.cold_start_steps, None, None
    if gan.weight > 0:
        late = route_steps(times, boundary=gan.boundary)[1]
        gan_step = late[shared_integer(seed, step, "gan_step", len(late))]
    if objective.matching_steps == "early":
        early = route_steps(times, boundary=gan.boundary)[0]
        matched = followed = early[shared_integer(seed, step, "matching_step", len(early))]
    elif cold or objective.matching_steps == "any":
        matched = shared_integer(seed, step, "matching_step", calls)
    else:
        matched = calls - 1
    if cold or step % (config.preference.updates_per_matching + 1) == 0:
        last = matched if gan_step is None else max(matched, gan_step)
        return Plan(last, matched, (), judged=False, shared_start=False, step=step, gan_step=gan_step)
    return Plan(
        calls - 1,
        None,
        (shared_integer(seed, step, "preference_step", calls - 1),),
        judged=config.preference.judge == "decoded",
        shared_start=True,
        step=step,
        gan_step=gan_step,
        followed_step=followed,
    )


@dataclass(frozen=True, eq=False)
class Rollout:
    """One slice of samples, without graph; states[j] is what call j was made on, predictions[j] its x0.

    `next_states` and `noises` belong to the random steps, `log_probs` [n] to those with the policy loss (under the
    unguided transition), `process_rewards` [n] and `guided_means` to the same with Euphonium, and `judgements` [n] to
    the step of Flash-DMD's pairs where a latent reward model judges them.
    """

    draw: Draw
    condition: Condition
    groups: SampleGroups
    prompts: list[str]
    states: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]
    next_states: tuple[Tensor, ...]
    noises: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]
    process_rewards: tuple[Tensor, ...]
    guided_means: tuple[Tensor, ...] = ()
    judgements: tuple[Tensor, ...] = ()

    @property
    def x0(self) -> Tensor:
        """The samples: the prediction of the last call."""
        return self.predictions[-1]


@torch.no_grad()
def draw_rollout(
    config: RewardRunConfig, setup: RewardSetup, indices: Sequence[int], plan: Plan, *, policy: nn.Module
) -> Rollout:
    """Roll the policy out for these sample numbers; neighbours of one group share their prompt.

    Noise is that of (seed, step, sample), where all of a group shares it that of (seed, step, group).
    """
    seed, device = config.run.seed, setup.device
    groups = group_samples(indices, config.reward.group_size, prompts=len(setup.prompts), seed=seed)
    condition = setup.prompts.rows(groups.rows)
    draw, numbers = Draw(seed, list(indices), device), groups.groups.tolist()
    prompts = [setup.prompts.prompts[row] for row in groups.rows]
    times = setup.student.times
    start = Draw(seed, numbers, device) if plan.shared_start else draw
    noise = start.noise(setup.latent_shape, "group_noise" if plan.shared_start else "noise")
    x_t = noise if times[0] == 1 else setup.student.denoiser.family.initial_state(noise, times[0])
    states: list[Tensor] = []
    predictions: list[Tensor] = []
    randoms: list[RandomStep] = []
    for j in range(plan.last + 1):
        t = torch.full((len(x_t),), times[j], dtype=x_t.dtype, device=x_t.device)
        velocity = policy(x_t, t, condition)
        states.append(x_t)
        predictions.append(x0_from_velocity(x_t, velocity, t))
        if j == len(times) - 1:
            break
        own = j in plan.policy_steps if plan.policy_steps else not plan.shared_start
        noise = transition_noise(
            seed, list(indices), numbers, setup.latent_shape, epoch=plan.step, chain_step=j, selected=own
        ).to(x_t)
        call = PolicyCall(x_t, velocity, j, condition, prompts)
        randoms.append(random_step(config, setup, call, noise, trained=j in plan.policy_steps))
        x_t = randoms[-1].state
    return Rollout(
        draw=draw,
        condition=condition,
        groups=groups,
        prompts=prompts,
        states=tuple(states),
        predictions=tuple(predictions),
        next_states=tuple(step.state for step in randoms),
        noises=tuple(step.noise for step in randoms),
        log_probs=tuple(step.log_prob for step in randoms if step.log_prob is not None),
        process_rewards=tuple(step.process_reward for step in randoms if step.process_reward is not None),
        guided_means=tuple(step.guided_mean for step in randoms if step.guided_mean is not None),
        judgements=tuple(step.judgement for step in randoms if step.judgement is not None),
    )


@dataclass(frozen=True, eq=False)
class PolicyCall:
    """Call j of a policy: the state it was made on, its velocity, and what the samples are of."""

    x_t: Tensor
    velocity: Tensor
    j: int
    condition: Condition
    prompts: list[str]


@dataclass(frozen=True, eq=False)
class RandomStep:
    """Where a random step led, by which noise; the others belong to steps with the policy loss (`Rollout`)."""

    state: Tensor
    noise: Tensor
    log_prob: Tensor | None = None
    process_reward: Tensor | None = None
    guided_mean: Tensor | None = None
    judgement: Tensor | None = None


def random_step(
    config: RewardRunConfig, setup: RewardSetup, call: PolicyCall, noise: Tensor, *, trained: bool
) -> RandomStep:
    """The step after a call; `trained` says whether it gets the policy loss."""
    times = setup.student.times
    step = transition(config, call.x_t, call.velocity, times, call.j)
    if not trained:
        return RandomStep(step.draw(noise), noise)
    if config.method == "euphonium":
        guided, rewards = steered(config, setup, step, call)
        state = guided.draw(noise)
        return RandomStep(state, noise, log_prob(config.chain, state, step), rewards, guided.mean)
    state, judgement = step.draw(noise), None
    if config.method == "flash" and setup.latent_reward is not None:
        # The candidate itself is judged, at its own time.
        t = torch.full((len(state),), times[call.j + 1], dtype=state.dtype, device=state.device)
        judgement = latent_judgement(setup.latent_reward, state, t, call.condition)
    return RandomStep(state, noise, log_prob(config.chain, state, step), judgement=judgement)


def latent_judgement(
    scorer: LatentScorer, x_t: Tensor, t: Tensor, condition: Condition, *, gradient: bool = False
) -> Tensor:
    """The latent scores [n]. Raises RewardError where they cannot be used, as for other scorers."""
    try:
        return latent_scores(scorer, x_t, t, condition, gradient=gradient)
    except ValueError as error:
        raise RewardError(f"the latent reward failed ({error})", clean=False) from error


def shared_draw(rollout: Rollout, draw: Draw) -> Draw:
    """The draw in which all samples of a group have the numbers of its first one."""
    first: dict[int, int] = {}
    numbers = rollout.groups.groups.tolist()
    for group, index in zip(numbers, draw.indices, strict=True):
        first.setdefault(group, index)
    return Draw(draw.seed, [first[group] for group in numbers], draw.device)


def transition(config: RewardRunConfig, x_t: Tensor, velocity: Tensor, times: Sequence[float], j: int) -> Transition:
    """The step from times[j] to times[j + 1]; the student's own are CPS: eta 1 re-noises x0, eta 0 is Euler's."""
    chain = config.chain
    t, t_next = (torch.full((len(x_t),), times[k], dtype=x_t.dtype, device=x_t.device) for k in (j, j + 1))
    if chain.transition == "sampler":
        return cps_transition(x_t, velocity, t, t_next, eta=1.0 if config.student.sampler == "sde" else 0.0)
    if chain.transition == "cps":
        return cps_transition(x_t, velocity, t, t_next, eta=chain.eta)
    if chain.transition == "flow_sde":
        diffusion = flow_sde_diffusion(t, scale=chain.noise_scale, second_time=times[1])
    else:
        diffusion = torch.full_like(t, chain.noise_scale)
    return sde_transition(x_t, velocity, t, t_next, diffusion=diffusion)


def log_prob(chain: ChainConfig, x_next: Tensor, step: Transition) -> Tensor:
    """[n], a mean over the elements."""
    return distance_log_prob(x_next, step) if chain.log_prob == "distance" else transition_log_prob(x_next, step)


def steered(
    config: RewardRunConfig, setup: RewardSetup, step: Transition, call: PolicyCall
) -> tuple[Transition, Tensor]:
    """Euphonium's guided transition and the process rewards [n] at x_t; above `highest_time` neither, and zeros.

    By default the process reward is the reward of the x0 that the policy predicts at x_t, with the velocity held, so no
    gradient passes through the policy (our reading); with judge 'latent' a latent reward model's, as in the paper.
    """
    times, x_t = setup.student.times, call.x_t
    t, t_next = (torch.full((len(x_t),), times[k], dtype=x_t.dtype, device=x_t.device) for k in (call.j, call.j + 1))
    if times[call.j] > config.process.highest_time:
        return step, torch.zeros_like(t)
    with torch.enable_grad():
        leaf = x_t.detach().requires_grad_()
        if setup.latent_reward is not None:
            rewards = latent_judgement(setup.latent_reward, leaf, t, call.condition, gradient=True)
        else:
            pixels = setup.teacher.decode(x0_from_velocity(leaf, call.velocity.detach(), t))
            rewards = setup.reward.total(setup.reward.with_gradient(pixels, call.prompts))
        gradient = process_gradient(rewards, leaf)
    gradient = unit_gradient(gradient) if config.process.unit_gradient else gradient
    scale = step_scale(t, t_next, guidance=config.process.guidance)
    return guided_transition(step, gradient, scale), rewards.detach()
