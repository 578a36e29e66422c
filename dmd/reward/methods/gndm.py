"""Distribution matching as a reward, normalised over groups (R_dm, GNDM, GNDMR; arXiv:2603.28460).

Only the abstract was at hand: that matching is a reward, that group means normalise it, that the view allows adaptive
weights beside external rewards and importance sampling. Every equation here is our reading. Legend: B samples, group
[B] the number of each sample's prompt (and shared t); velocities, x0 [B, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.paths import add_noise, at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.shapes import require_same_shape
from fewstep.core.time_law import law_interval
from fewstep.dmd.loss import NORMALISER_FLOOR, direction_normaliser, distribution_matching_loss
from fewstep.dmd.reward.chain import (
    CallKey,
    Loss,
    Plan,
    PolicyCall,
    Prepared,
    RandomStep,
    Rollout,
    chain_plan,
    plain_step,
    planned_calls,
    policy_loss,
    scored_step,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.inputs import Reduction, finite_values, group_mean, group_std, over_elements
from fewstep.dmd.reward.matching import compare_scores, require_matching
from fewstep.dmd.reward.methods.rtdmd import direct_needs, direct_term, tilt_record
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import Needs, RewardSetup


def likelihood_weight(t: Tensor) -> Tensor:
    """(1 - t) / t: with it the error difference of two velocities, integrated over t in (0, 1), is a log-density ratio.

    From log p(x0) = const - 1/2 integral of E|eps - eps_hat|^2 d log SNR, exact for exact denoisers (pointwise form in
    arXiv:2302.03792), with eps_hat - eps = (1 - t) (v_hat - v) and d log SNR = -2 dt / (t (1 - t)).

    Raises:
        ValueError: a time is outside (0, 1].
    """
    t = at_least_fp32(t)
    if not bool(((t > 0) & (t <= 1)).all()):
        raise ValueError(f"times must lie in (0, 1], got {t.tolist()}")
    return (1 - t) / t


@torch.no_grad()
def matching_reward(
    fake_velocity: Tensor, real_velocity: Tensor, target_velocity: Tensor, t: Tensor, *, reduction: Reduction = "sum"
) -> Tensor:
    """(1 - t) / t (|v_fake - v|^2 - |v_real - v|^2), [B], without graph.

    Averaged over uniform t and eps this is log p_real(x0) - log p_fake(x0), whose policy gradient is that of DMD.
    Draw t and eps once for a group: what all samples share drops out when the group's mean is subtracted.

    Args:
        fake_velocity: [B, ...] of the fake score at x_t.
        real_velocity: [B, ...] of the teacher at the same x_t.
        target_velocity: [B, ...] eps - x0.
        t: [B] in (0, 1].
        reduction: "sum" is the log ratio of the sample, "mean" divides it by the number of elements.

    Raises:
        ValueError: the shapes differ, or a time is outside (0, 1].
    """
    require_same_shape(fake_velocity=fake_velocity, real_velocity=real_velocity, target_velocity=target_velocity)
    target = at_least_fp32(target_velocity)
    fake, real = (at_least_fp32(fake_velocity) - target).square(), (at_least_fp32(real_velocity) - target).square()
    return likelihood_weight(t) * over_elements(fake - real, reduction)


def gndm_loss(
    x0: Tensor, fake_x0: Tensor, real_x0: Tensor, group: Tensor, *, floor: float = NORMALISER_FLOOR
) -> Tensor:
    """DMD with the normaliser averaged over the group, which makes it a steadier statistic; groups of one are DMD.

    The direction itself is never centred: in a group it is mostly the common shift that has to be learnt, and for a
    student that differs in its mean alone, all of it.

    Raises:
        ValueError: the shapes differ, or group is not integer and [B].
    """
    own = direction_normaliser(x0, real_x0, floor=floor)
    return distribution_matching_loss(x0, fake_x0, real_x0, weight=own / group_mean(own, group), floor=floor)


def gndmr_advantages(
    matching_rewards: Tensor, rewards: Tensor, group: Tensor, *, tilt_scale: float, std_floor: float = 1e-4
) -> Tensor:
    """Centred R_dm + tilt_scale r, divided by the group's std of tilt_scale r alone, [B].

    The zero of its policy gradient is the teacher tilted by e^{tilt_scale r}. Both terms share one divisor: dividing
    each by its own std, as usual for several rewards, loses the temperature, since at every tilt lambda the centred
    R_dm is -lambda r and both normalised terms cancel for any lambda. The external reward's std is taken because the
    sum's vanishes at the fixed point.

    Raises:
        ValueError: a reward is not finite, tilt_scale is not positive, or group is not integer and [B].
    """
    if tilt_scale <= 0:
        raise ValueError(f"tilt_scale must be positive, got {tilt_scale}; without a reward use group_advantages")
    matching = finite_values(matching_rewards.detach(), "matching rewards")
    tilt = tilt_scale * finite_values(rewards.detach(), "rewards")
    total = matching + tilt
    return (total - group_mean(total, group)) / (group_std(tilt, group) + std_floor)


def adaptive_weight(matching_gradient: Tensor, reward_gradient: Tensor, *, share: float, floor: float = 1e-8) -> Tensor:
    """share |grad matching| / (|grad reward| + floor), 0-dim: the reward's gradient becomes `share` of the other's.

    Both with respect to the student's samples [B, ...]. Taken anew at each step it leaves no tilt: the gradients can
    cancel only where share |grad matching| = |grad matching|, so for share < 1 the student rests at the teacher and for
    share > 1 nowhere. Averaged over many steps it is a weight like any other.

    Raises:
        ValueError: the shapes differ, or share is negative.
    """
    require_same_shape(matching_gradient=matching_gradient, reward_gradient=reward_gradient)
    if share < 0:
        raise ValueError(f"share must not be negative, got {share}")
    matching, reward = at_least_fp32(matching_gradient.detach()), at_least_fp32(reward_gradient.detach())
    return share * matching.norm() / (reward.norm() + floor)


class Gndm:
    """GNDMR: policy gradients of matching and reward together, beside matching normalised in groups."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.gndm is not None
        self.config, self.setup, self.settings = config, setup, config.gndm

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.gndm is not None
        return direct_needs(config.gndm.direct, config.gndm.kl_weight)

    def plan(self, step: int) -> Plan:
        return chain_plan(self.config, self.settings, step, len(self.setup.student.times))

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        times = self.setup.student.times
        if not trained:
            return plain_step(self.config, times, call, noise)
        return scored_step(self.config, self.settings, times, call, noise)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        return Prepared(draw)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        direct = self.settings.direct is not None and rollout.plan.judged
        return planned_calls(self.setup, rollout, last=direct)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        config, setup, settings = self.config, self.setup, self.settings
        weight = require_matching(config).weight
        scores = compare_scores(config, setup, rollout, velocities, draw=prepared.draw)
        matching = gndm_loss(scores.x0, scores.fake_x0, scores.real_x0, rollout.groups.groups.to(scores.x0.device))
        record = scores.record | tilt_record(settings.direct, setup, scores, weight=weight)
        if rewards is None:
            return weight * matching, record
        advantages, found = self.matched_advantages(rollout, rewards.total, prepared.draw)
        policy, means = policy_loss(config, setup, settings, rollout, velocities, advantages)
        loss, record = settings.policy_weight * policy + weight * matching, {**record, **means, **found}
        if settings.direct is not None:
            direct, found = direct_term(setup, settings.direct, rollout, velocities)
            loss, record = loss + settings.direct.weight * direct, {**record, **found}
        return loss, record

    @torch.no_grad()
    def matched_advantages(self, rollout: Rollout, total: Tensor, draw: Draw) -> Loss:
        """The advantages [n]: the matching reward, estimated from draws that a group shares, and the reward."""
        setup, settings = self.setup, self.settings
        assert setup.fake_score is not None
        shared, estimates = rollout.shared(draw), []
        for k in range(settings.matching_reward_draws):
            low, high = law_interval(require_matching(self.config).score_times, setup.teacher.family)
            t = shared.uniform(f"matching_reward_time_{k}").clamp(low, high)
            eps = shared.noise(setup.latent_shape, f"matching_reward_noise_{k}")
            x_t = add_noise(rollout.x0, eps, t)
            fake = setup.fake_score(x_t, t, rollout.condition).velocity
            # The middle of what is drawn where guidance is spread: an advantage is no gradient.
            guidance = require_matching(self.config).guidance_of(self.config.teacher)
            real = setup.teacher.velocity(x_t, t, rollout.condition, guidance)
            reduction = settings.matching_reward_reduction
            estimates.append(matching_reward(fake, real, eps - rollout.x0, t, reduction=reduction))
        matching = torch.stack(estimates).mean(dim=0)
        group, scale = rollout.groups.groups.to(total.device), settings.tilt_scale
        record = {
            "matching_reward_spread": group_std(matching, group).mean(),
            "tilt_spread": group_std(scale * total, group).mean(),
        }
        return gndmr_advantages(matching, total, group, tilt_scale=scale), record
