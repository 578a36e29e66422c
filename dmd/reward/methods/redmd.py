"""Rewards as weights of the distribution matching gradient: Re-DMD per rollout, Stream-R1 per space-time element.

A weight multiplies a direction that vanishes where the fake score equals the teacher, so a student of full capacity
comes to rest at the teacher itself, untilted, whatever the weights: they decide what is learnt first, and what a
student of small capacity gives up. Legend: B rollouts, K reward axes, T history length, F frames; x0 [B, C, F, H, W]
or [B, C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.paths import at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.shapes import expand_weight, require_same_shape
from fewstep.dmd.loss import NORMALISER_FLOOR, matching_direction
from fewstep.dmd.reward.chain import (
    CallKey,
    Loss,
    Plan,
    PolicyCall,
    Prepared,
    RandomStep,
    Rollout,
    plain_step,
    planned_calls,
    reward_plan,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.inputs import finite_values
from fewstep.dmd.reward.matching import ComparedScores, compare_scores, matching_term, require_matching
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import Needs, RewardSetup


@dataclass(frozen=True, eq=False)
class RolloutWeights:
    """Weights [B] without graph, and two 0-dim figures to log.

    Attributes:
        weight: mean 1 over the population before the clip.
        effective_share: (sum w)^2 / (N sum w^2) over the population before the clip, in (0, 1]. exp(-s^2 tilt_scale^2)
            for normal rewards of std s: 0.018 for Re-DMD's 2 with z-scored rewards.
        clipped_share: share of the population above max_weight.
    """

    weight: Tensor
    effective_share: Tensor
    clipped_share: Tensor


def rollout_weights(
    rewards: Tensor, *, tilt_scale: float, max_weight: float = 5.0, population: Tensor | None = None
) -> RolloutWeights:
    """min(exp(tilt_scale r) / mean exp(tilt_scale r), max_weight) (Re-DMD, Reward Forcing, arXiv:2512.04678).

    The paper writes exp(r / beta) with beta 1/2, its code exp(2 r). Neither divides by the mean or clips: unnormalised
    weights change the learning rate over a run, and one rollout may own the batch. Both are our addition.

    Args:
        rewards: [B].
        tilt_scale: factor of the reward, 0 is plain DMD.
        max_weight: clip, above 1.
        population: [N] the rewards of all processes, of which the mean is taken; None is `rewards`.

    Raises:
        ValueError: a reward is not finite, or max_weight is below 1.
    """
    if max_weight < 1:
        raise ValueError(f"max_weight must be at least 1, the mean weight, got {max_weight}")
    own = tilt_scale * finite_values(rewards.detach(), "rewards")
    everyone = own if population is None else tilt_scale * finite_values(population.detach(), "rewards")
    log_mean = everyone.logsumexp(dim=0) - torch.log(torch.full_like(everyone[0], len(everyone)))
    all_weights = (everyone - log_mean).exp()
    return RolloutWeights(
        weight=(own - log_mean).exp().clamp(max=max_weight),
        effective_share=all_weights.mean().square() / all_weights.square().mean(),
        clipped_share=(all_weights > max_weight).to(own.dtype).mean(),
    )


@torch.no_grad()
def space_time_weight(
    saliency: Tensor,
    axis_rewards: Tensor,
    *,
    temperature: float = 1.0,
    frame_floor: float = 0.2,
    pixel_floor: float = 0.15,
) -> Tensor:
    """Weights [B, 1, F, H, W] of mean one from how strongly each place moves the rewards (Stream-R1, arXiv:2605.03849).

    Axes are fused with softmax(-r / temperature), so a weak axis counts more. Frame means, then each frame's pixels,
    are scaled to [0, 1], raised to their floors and divided by their mean; the product is divided by its mean. A
    constant saliency gives ones. The floors act before the division, so the smallest weight differs from them. Our
    reading: saliency is the mean over channels of |d r_k / d pixel|, resized to the latent's grid.

    Args:
        saliency: [B, K, F, H, W], not negative.
        axis_rewards: [B, K].
        temperature: of the fusion, positive.
        frame_floor: smallest frame profile before the division.
        pixel_floor: smallest value inside a frame before the division.

    Raises:
        ValueError: shapes do not fit, saliency is negative or not finite, or a parameter is out of range.
    """
    if saliency.ndim != 5 or axis_rewards.shape != saliency.shape[:2]:
        raise ValueError(
            f"need saliency [B, K, F, H, W] and rewards [B, K], got {tuple(saliency.shape)} and "
            f"{tuple(axis_rewards.shape)}"
        )
    if temperature <= 0 or not 0 < frame_floor <= 1 or not 0 < pixel_floor <= 1:
        raise ValueError(
            f"need temperature > 0 and floors in (0, 1], got {temperature}, {frame_floor} and {pixel_floor}"
        )
    if not bool((torch.isfinite(saliency) & (saliency >= 0)).all()):
        raise ValueError("saliency must be finite and not negative: give the absolute gradient of the reward")
    finite_values(axis_rewards.flatten(), "rewards")
    share = torch.softmax(-at_least_fp32(axis_rewards) / temperature, dim=1)
    fused = (share[:, :, None, None, None] * at_least_fp32(saliency)).sum(dim=1)
    frames = _profile(fused.mean(dim=(2, 3)), frame_floor)
    pixels = _profile(fused.flatten(2), pixel_floor).view_as(fused)
    weight = frames[:, :, None, None] * pixels
    return (weight / weight.mean(dim=(1, 2, 3), keepdim=True)).unsqueeze(1)


def weighted_matching_loss(
    x0: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    weight: Tensor,
    *,
    element_weight: Tensor | None = None,
    floor: float = NORMALISER_FLOOR,
) -> Tensor:
    """1/2 mean(w W (x0 - stop(x0 - g))^2): its gradient with respect to x0 is w W g / numel, g that of DMD.

    Re-DMD with `weight` alone, Stream-R1 with both. The fake score's own loss stays unweighted.

    Args:
        x0: [B, ...] student sample, with graph.
        fake_x0: [B, ...] prediction of the fake score.
        real_x0: [B, ...] prediction of the teacher.
        weight: [B], one per rollout; no gradient reaches it.
        element_weight: [B, 1, F, H, W], or None for ones.
        floor: smallest normaliser, which is not weighted.

    Raises:
        ValueError: the shapes differ, or a weight is not finite.
    """
    require_same_shape(x0=x0, fake_x0=fake_x0, real_x0=real_x0)
    factor = expand_weight(finite_values(weight.detach(), "weights"), x0)
    if element_weight is not None:
        one_channel = (x0.shape[0], 1, *x0.shape[2:])
        if element_weight.shape != one_channel:
            raise ValueError(f"element_weight must be {one_channel}, one channel, got {tuple(element_weight.shape)}")
        factor = factor * at_least_fp32(element_weight.detach())
    direction = matching_direction(x0, fake_x0, real_x0, floor=floor)
    x0 = at_least_fp32(x0)
    return 0.5 * (factor * (x0 - x0.detach() + direction).square()).mean()


def _profile(values: Tensor, floor: float) -> Tensor:
    """Scaled to [0, 1] over the last dimension, raised to the floor, divided by the mean; ones where all are equal."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    # A relative threshold: gradients of a reward have any scale.
    flat = high - low <= 1e-6 * high
    width = torch.where(flat, torch.ones_like(high), high - low)
    scaled = torch.where(flat, torch.ones_like(values), (values - low) / width)
    raised = scaled.clamp(min=floor)
    return raised / raised.mean(dim=-1, keepdim=True)


class Redmd:
    """Re-DMD: matching weighted by exp(tilt_scale reward) per sample, and with `saliency` per element."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.redmd is not None
        self.config, self.setup, self.settings = config, setup, config.redmd

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.redmd is not None
        return Needs(reward_gradient=config.redmd.saliency)

    def plan(self, step: int) -> Plan:
        """The matched output is what is scored, so the rollout ends there."""
        plan = reward_plan(self.config, step, len(self.setup.student.times))
        assert plan.matching_step is not None
        return replace(plan, last=plan.matching_step)

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        return plain_step(self.config, self.setup.student.times, call, noise)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        return Prepared(draw)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        return planned_calls(self.setup, rollout)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        if rewards is None:
            return matching_term(self.config, self.setup, rollout, prepared, velocities)
        scores = compare_scores(self.config, self.setup, rollout, velocities, draw=prepared.draw)
        loss, record = self.weighted_loss(rollout, scores, rewards)
        return require_matching(self.config).weight * loss, {**scores.record, **record}

    def weighted_loss(self, rollout: Rollout, scores: ComparedScores, rewards: SliceRewards) -> Loss:
        """The weighted matching loss of the samples; the mean weight over the whole step is 1."""
        weights = rollout_weights(
            rewards.total,
            tilt_scale=self.settings.tilt_scale,
            max_weight=self.settings.max_weight,
            population=rewards.population,
        )
        x0, fake_x0, real_x0 = scores.x0, scores.fake_x0, scores.real_x0
        if self.settings.saliency:
            elements = element_weights(self.setup, rollout)
            # A picture is a clip of one frame.
            clips = (x0[:, :, None], fake_x0[:, :, None], real_x0[:, :, None])
            loss = weighted_matching_loss(*clips, weights.weight, element_weight=elements)
        else:
            loss = weighted_matching_loss(x0, fake_x0, real_x0, weights.weight)
        return loss, {"effective_share": weights.effective_share, "clipped_weight_share": weights.clipped_share}


def element_weights(setup: RewardSetup, rollout: Rollout) -> Tensor:
    """Stream-R1's weights [n, 1, 1, h, w] of pictures, clips of one frame: where the rewards are sensitive.

    The saliency of a scorer is the channel mean of |d score / d pixel|, averaged over the pixels under each element.
    Its penalty for rewards that fall behind is one number for all samples of a step, which the division of weights by
    their mean takes out again, so it is left out.
    """
    with torch.enable_grad():
        pixels = setup.teacher.decode(rollout.x0).detach().requires_grad_()
        values = setup.reward.with_gradient(pixels, rollout.prompts)
        maps = [torch.autograd.grad(row.sum(), pixels, retain_graph=True)[0].abs().mean(dim=1) for row in values]
    size = (rollout.x0.shape[-2], rollout.x0.shape[-1])
    saliency = F.interpolate(torch.stack(maps, dim=1), size=size, mode="area")
    return space_time_weight(saliency[:, :, None], values.detach().T)
