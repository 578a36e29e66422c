"""Rollouts of a few-step policy with everything that a reward loss needs of them, and what each step does with them.

Legend: n samples of one slice; states, x0 [n, C, h, w]; K calls of the student at times t_0 > ... > t_{K-1}; the step
after call j < K - 1 is random and leads to t_{j+1}, the last call gives the sample itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.core.paths import x0_from_velocity
from fewstep.core.randomness import Draw, sample_uniform, shared_integer
from fewstep.dmd.reward.chain import Plan, PolicyCall, RandomStep, Rollout, latent_judgement, log_prob, transition
from fewstep.dmd.reward.config import CHAIN_METHODS, RewardRunConfig
from fewstep.dmd.reward.groups import group_samples
from fewstep.dmd.reward.methods.euphonium import steered
from fewstep.dmd.reward.methods.flash import flash_plan
from fewstep.dmd.reward.methods.flow_grpo import select_steps, transition_noise
from fewstep.dmd.reward.setup import RewardSetup


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
