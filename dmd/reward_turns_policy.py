"""Policy gradients on the student's random steps: Flow-GRPO, RTDMD's SubGRPO, GNDMR, Euphonium, and Flash-DMD's pairs.

Legend: n samples of one slice; J random steps with a loss; velocities, states [n, C, h, w]; log ratios [n].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.dmd.reward.euphonium import dual_surrogate, guidance_distillation_loss
from fewstep.dmd.reward.flash_dmd import best_and_worst, preference_loss, preference_margin
from fewstep.dmd.reward.flow_sde import transition_kl
from fewstep.dmd.reward.gndm import gndmr_advantages, matching_reward
from fewstep.dmd.reward.grpo import clipped_surrogate
from fewstep.dmd.reward.inputs import group_std
from fewstep.dmd.reward_config import RewardRunConfig
from fewstep.dmd.reward_setup import RewardSetup
from fewstep.dmd.reward_turns_rollout import Plan, Rollout, log_prob, shared_draw, transition
from fewstep.dmd.reward_turns_scores import SliceRewards
from fewstep.dmd.turns import Draw


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


@torch.no_grad()
def reference_mean(config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, j: int) -> Tensor:
    """The mean of random step j under the student at the start."""
    assert setup.reference is not None
    x_t, times = rollout.states[j], setup.student.times
    t = torch.full((len(x_t),), times[j], dtype=x_t.dtype, device=x_t.device)
    return transition(config, x_t, setup.reference(x_t, t, rollout.condition), times, j).mean


@torch.no_grad()
def matched_advantages(
    config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, total: Tensor, *, draw: Draw
) -> tuple[Tensor, dict[str, Tensor]]:
    """GNDMR's advantages [n]: the matching reward, estimated from draws that a group shares, and the reward."""
    assert setup.fake_score is not None
    loss, count = config.loss, config.objective.matching_reward_draws
    shared = shared_draw(rollout, draw)
    estimates, reduction = [], config.objective.matching_reward_reduction
    for k in range(count):
        t = shared.times(f"matching_reward_time_{k}", shift=1.0, loss=loss)
        eps = shared.noise(setup.latent_shape, f"matching_reward_noise_{k}")
        x_t = add_noise(rollout.x0, eps, t)
        fake = setup.fake_score(x_t, t, rollout.condition).velocity
        real = setup.teacher.velocity(x_t, t, rollout.condition, config.teacher.guidance)
        estimates.append(matching_reward(fake, real, eps - rollout.x0, t, reduction=reduction))
    matching = torch.stack(estimates).mean(dim=0)
    group, scale = rollout.groups.groups.to(total.device), config.objective.tilt_scale
    record = {
        "matching_reward_spread": group_std(matching, group).mean(),
        "tilt_spread": group_std(scale * total, group).mean(),
    }
    return gndmr_advantages(matching, total, group, tilt_scale=scale), record


def pair_loss(
    config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, j: int, *, velocity: Tensor, scores: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flash-DMD's preference of the best over the worst of each group, which left step j from one state.

    `scores` [n] are those of a latent reward model at the noisy candidates, as in the paper, or by default the rewards
    of the finished samples, all later noise being shared (our reading). Groups whose samples all score the same have no
    pair and add nothing.
    """
    size = config.reward.group_size
    grouped = scores.view(-1, size)
    differs = grouped.amax(dim=1) > grouped.amin(dim=1)
    record = {"pair_share": differs.float().mean()}
    if rollout.judgements:
        record["latent_reward"] = scores.mean()
    first = torch.arange(len(grouped), device=scores.device) * size
    if not bool(differs.any()):
        return velocity.sum() * 0.0, {**record, "margin": scores.new_zeros(())}
    wins, loses = best_and_worst(grouped[differs])
    start, win, lose = first[differs], first[differs] + wins, first[differs] + loses
    step = transition(config, rollout.states[j][start], velocity[start], setup.student.times, j)
    reference = reference_mean(config, setup, rollout, j)[start]
    nexts = rollout.next_states[j]
    margin = preference_margin(nexts[win], nexts[lose], step, reference, reduction="mean")
    loss = preference_loss(margin, dpo_beta=config.preference.dpo_beta)
    return loss * record["pair_share"], {**record, "margin": margin.detach().mean()}
