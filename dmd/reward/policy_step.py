"""Policy gradients on the student's random steps: Flow-GRPO, RTDMD's SubGRPO, GNDMR, Euphonium, and Flash-DMD's pairs.

Legend: n samples of one slice; J random steps with a loss; velocities, states [n, C, h, w]; log ratios [n].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.randomness import Draw
from fewstep.dmd.reward.chain import Plan, Rollout, log_prob, reference_mean, transition
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.flow_sde import transition_kl
from fewstep.dmd.reward.methods.euphonium import dual_surrogate, guidance_distillation_loss
from fewstep.dmd.reward.methods.flash import pair_loss
from fewstep.dmd.reward.methods.flow_grpo import clipped_surrogate
from fewstep.dmd.reward.methods.gndm import matched_advantages
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import RewardSetup


def policy_loss(
    config: RewardRunConfig,
    setup: RewardSetup,
    rollout: Rollout,
    plan: Plan,
    *,
    velocities: Sequence[Tensor],
    rewards: SliceRewards | None,
    draw: Draw,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the plan's random steps of the method's loss; velocities are those of the student there.

    Flash-DMD alone has no rewards where a latent reward model has judged its candidates.
    """
    if config.method == "flash":
        (j,), (velocity,) = plan.policy_steps, velocities
        scores = rollout.judgements[0] if rewards is None else rewards.total
        loss, record = pair_loss(config, setup, rollout, j, velocity=velocity, scores=scores)
        return loss, {"policy_loss": loss.detach(), **record}
    assert rewards is not None
    advantages, found = rewards.advantages, {}
    if config.method == "gndm":
        advantages, found = matched_advantages(config, setup, rollout, rewards.total, draw=draw)
    losses, records = [], []
    for place, j in enumerate(plan.policy_steps):
        process = rewards.process[place] if len(rewards.process) else None
        loss, record = step_loss(
            config, setup, rollout, j, velocity=velocities[place], place=place, advantages=(advantages, process)
        )
        losses.append(loss)
        records.append(record)
    loss = torch.stack(losses).mean()
    means = {name: torch.stack([record[name] for record in records]).mean() for name in records[0]}
    return loss, {"policy_loss": loss.detach(), **means, **found}


def step_loss(
    config: RewardRunConfig,
    setup: RewardSetup,
    rollout: Rollout,
    j: int,
    *,
    velocity: Tensor,
    place: int,
    advantages: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of random step j (number `place` of those with a loss), with its KL to the start."""
    chain, times = config.chain, setup.student.times
    step = transition(config, rollout.states[j], velocity, times, j)
    log_ratio = log_prob(chain, rollout.next_states[j], step) - rollout.log_probs[place]
    outcome, process = advantages
    clip = {"clip_range": chain.clip_range, "advantage_clip": chain.advantage_clip}
    if process is None:
        surrogate = clipped_surrogate(log_ratio, outcome, **clip)
        loss = surrogate.loss
    else:
        clamped = (a.clamp(-chain.advantage_clip, chain.advantage_clip) for a in (outcome, process))
        weight = config.process.weight
        loss, surrogate, _ = dual_surrogate(log_ratio, *clamped, process_weight=weight, clip_range=chain.clip_range)
    record = {"clipped_share": surrogate.clipped_share, "ratio_deviation": surrogate.ratio_deviation}
    if config.method == "euphonium" and config.process.distill_weight > 0:
        distilled = step.mean.new_zeros(())
        if times[j] <= config.process.highest_time:
            distilled = guidance_distillation_loss(step, rollout.guided_means[place])
        loss = loss + config.process.distill_weight * distilled
        record["distill_loss"] = distilled.detach()
    if chain.kl_weight == 0:
        return loss, record
    kl = transition_kl(step, reference_mean(config, setup, rollout, j)).mean()
    return loss + chain.kl_weight * kl, {**record, "kl": kl.detach()}
