"""Rewards as weights of the distribution matching gradient: Re-DMD per rollout, Stream-R1 per space-time element.

A weight multiplies a direction that vanishes where the fake score equals the teacher, so a student of full capacity
comes to rest at the teacher itself, untilted, whatever the weights: they decide what is learnt first, and what a
student of small capacity gives up. Legend: B rollouts, K reward axes, T history length, F frames; x0 [B, C, F, H, W]
or [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.dmd.loss import distribution_matching_loss
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
        elements = element_weights(self.setup, rollout) if self.settings.saliency else None
        compared = (scores.x0, scores.fake_x0, scores.real_x0)
        loss = distribution_matching_loss(*compared, weight=weights.weight, elements=elements)
        return loss, {"effective_share": weights.effective_share, "clipped_weight_share": weights.clipped_share}


def element_weights(setup: RewardSetup, rollout: Rollout) -> Tensor:
    """Stream-R1's weights [n, 1, (F,) h, w] of the rollout's samples: where the rewards are sensitive.

    Its penalty for rewards that fall behind is one number for all samples of a step, which the division of weights by
    their mean takes out again, so it is left out.
    """
    with torch.no_grad():
        pixels = setup.teacher.decode(rollout.x0)
    values, maps = setup.reward.sensitivity(pixels, rollout.prompts)
    x0 = rollout.x0
    frames = x0.shape[2] if x0.ndim == 5 else 1
    saliency = latent_saliency(maps if x0.ndim == 5 else maps[:, :, None], frames, x0.shape[-2:])
    weight = space_time_weight(saliency.transpose(0, 1), values.T)
    return weight if x0.ndim == 5 else weight[:, :, 0]


def latent_saliency(maps: Tensor, frames: int, size: Sequence[int]) -> Tensor:
    """Maps [R, n, T, H, W] of pixels as means over what lies under each element: [R, n, frames, h, w].

    The first latent frame stands for the first pixel frame, and each later one for as many as the others (Wan, LTX).
    Raises ValueError where pixel frames do not fall so.
    """
    spatial = functional.interpolate(maps.flatten(0, 1), size=tuple(size), mode="area").unflatten(0, maps.shape[:2])
    pixel_frames = spatial.shape[2]
    if pixel_frames == frames:
        return spatial
    if frames > 1 and (pixel_frames - 1) % (frames - 1) == 0:
        later = spatial[:, :, 1:].unflatten(2, (frames - 1, -1)).mean(dim=3)
        return torch.cat([spatial[:, :, :1], later], dim=2)
    raise ValueError(f"{pixel_frames} pixel frames do not fall into {frames} latent frames, the first of one alone")
