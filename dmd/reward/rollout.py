"""Rollouts of a few-step policy with everything that a reward loss needs of them.

Legend: n samples of one slice; states, x0 [n, C, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.paths import x0_from_velocity
from fewstep.core.randomness import Draw, sample_noise
from fewstep.dmd.reward.chain import Plan, PolicyCall, RandomStep, Rollout
from fewstep.dmd.reward.groups import group_samples
from fewstep.dmd.reward.student_step import RewardMethod


@torch.no_grad()
def draw_rollout(method: RewardMethod, indices: Sequence[int], plan: Plan) -> Rollout:
    """Roll the policy out for these sample numbers; neighbours of one group share their prompt.

    Noise is that of (seed, step, sample), where all of a group shares it that of (seed, step, group).
    """
    setup, seed = method.setup, method.config.run.seed
    groups = group_samples(indices, method.config.reward.group_size, prompts=len(setup.prompts), seed=seed)
    condition = setup.prompts.rows(groups.rows)
    draw, numbers = Draw(seed, list(indices), setup.device), groups.groups.tolist()
    prompts = [setup.prompts.prompts[row] for row in groups.rows]
    times, policy = setup.student.times, setup.behaviour
    start = Draw(seed, numbers, setup.device) if plan.shared_start else draw
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
        randoms.append(method.random_step(call, noise, trained=j in plan.policy_steps))
        x_t = randoms[-1].state
    return Rollout(
        plan=plan,
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


def transition_noise(
    seed: int,
    sample_indices: Sequence[int],
    prompt_indices: Sequence[int],
    shape: tuple[int, ...],
    *,
    epoch: int,
    chain_step: int,
    selected: bool,
) -> Tensor:
    """Noise [B, *shape] of one stochastic step of a rollout (RTDMD, arXiv:2605.26108), fp32 on the CPU.

    On a step that is not `selected` all samples of a prompt share it, which takes that step's noise out of the
    comparison inside the group. The initial noise is never shared. It depends on the arguments alone, so every
    process draws the same for the same prompt.

    Raises:
        ValueError: there are not as many prompts as samples.
    """
    if len(sample_indices) != len(prompt_indices):
        raise ValueError(f"{len(sample_indices)} samples need as many prompts, got {len(prompt_indices)}")
    rows = sample_indices if selected else prompt_indices
    # Different streams: prompt 3 and sample 3 are different things.
    kind = "sample" if selected else "prompt"
    return sample_noise(seed, rows, shape, step=epoch, stream=f"transition_{chain_step}_{kind}")
