"""Centred reward distillation (CRD, arXiv:2603.14128), after a released implementation and the abstract.

A policy tilted by e^{r / beta} has r = beta log(policy / old) + beta log Z(prompt). Centring inside a prompt cancels
Z, and the log ratio is read off denoising errors. Legend: B samples; velocities [B, ...] at the same (x_t, t);
implicit and external rewards, group [B].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.shapes import require_same_shape
from fewstep.dmd.loss import direction_normaliser
from fewstep.dmd.reward.chain import (
    CallKey,
    Loss,
    NoisedSamples,
    Plan,
    PolicyCall,
    Prepared,
    RandomStep,
    Rollout,
    plain_step,
    reward_plan,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.inputs import Reduction, finite_values, group_sum, over_elements, reference_penalty
from fewstep.dmd.reward.matching import matching_term
from fewstep.dmd.reward.methods.forward import forward_calls, noise_samples
from fewstep.dmd.reward.methods.nft import optimality_probability
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import Needs, RewardSetup


def implicit_reward(
    velocity: Tensor,
    old_velocity: Tensor,
    target_velocity: Tensor,
    *,
    weight: Tensor | None = None,
    adaptive: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """weight (|v_old - v|^2 - |v_policy - v|^2), [B]: how much better the policy denoises the sample than the old one.

    Zero for policy = old. One draw of (t, eps) is a noisy estimate, and its noise pulls the policy back to the old
    one; sharing the draw inside a group removes most of it by the centring. Without weight the temperature depends on
    t (a Gaussian shifts by k D^2 / (2 beta t^2) for a reward of slope k, D the variance at t); summed over elements,
    weighted by `gndm.likelihood_weight` and averaged over uniform t, the implicit reward is log(policy / old) and the
    tilt is exact.

    Args:
        velocity: [B, ...] of the policy, with graph.
        old_velocity: [B, ...] of the snapshot in the loss, without.
        target_velocity: [B, ...] eps - x0.
        weight: [B], None is one.
        adaptive: divide each error by its mean absolute value first.
        reduction: over the elements.

    Raises:
        ValueError: the shapes differ, or weight is not [B].
    """
    require_same_shape(velocity=velocity, old_velocity=old_velocity, target_velocity=target_velocity)
    target = at_least_fp32(target_velocity.detach())
    errors = []
    for prediction in (at_least_fp32(velocity), at_least_fp32(old_velocity.detach())):
        error = over_elements((prediction - target).square(), reduction)
        errors.append(error / direction_normaliser(prediction, target) if adaptive else error)
    difference = errors[1] - errors[0]
    if weight is None:
        return difference
    if weight.shape != difference.shape:
        raise ValueError(f"a weight per sample must be [{len(difference)}], got shape {tuple(weight.shape)}")
    return weight * difference


def centring_weights(external: Tensor, group: Tensor, *, temperature: float = math.inf) -> Tensor:
    """Weights [B] that sum to one in each group: uniform, or half softmax(r / T) and half softmax(-r / T).

    Raises:
        ValueError: temperature is not positive, a reward is not finite, or group is not integer and [B].
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; infinity is the uniform mean")
    external = finite_values(external.detach(), "external rewards")
    count = group_sum(torch.ones_like(external), group)
    if math.isinf(temperature):
        return 1 / count
    outside = group[:, None] != group[None, :]
    parts = []
    for sign in (1, -1):
        logits = (sign * external / temperature).expand(len(external), -1).masked_fill(outside, -math.inf)
        parts.append(logits.softmax(dim=1).diagonal())
    return (parts[0] + parts[1]) / 2


def crd_loss(
    implicit: Tensor,
    external: Tensor,
    group: Tensor,
    *,
    crd_beta: float = 1.0,
    max_advantage: float = 5.0,
    temperature: float = math.inf,
    form: Literal["mse", "bce"] = "mse",
) -> Tensor:
    """max_advantage / beta mean(beta R_c - r_c)^2, both centred in their group; its zero is the tilt e^{r / beta}.

    "bce" takes binary cross-entropy between beta R_c and sigmoid(r_c) instead of the square. The centre of R carries
    no gradient; with uniform weights that changes nothing. The released code centres over whatever a micro-step
    gathered, which mixes prompts; this centres by group, as the derivation needs. Keep the reference of the loss and
    the policy that samples as two snapshots: if both equal the policy, R is zero in value and the target cannot be
    reached.

    Args:
        implicit: [B] R with graph, averaged over draws if there are several.
        external: [B] r, `nft.optimality_probability` of the advantages.
        group: [B] integers, complete groups.
        crd_beta: temperature.
        max_advantage: scale of the loss.
        temperature: of the centring weights.
        form: see above.

    Raises:
        ValueError: a reward is not finite, crd_beta is not positive, the form is unknown, or shapes do not fit.
    """
    if crd_beta <= 0:
        raise ValueError(f"crd_beta must be positive, got {crd_beta}")
    external, implicit = (
        finite_values(external.detach(), "external rewards"),
        finite_values(implicit, "implicit rewards"),
    )
    if implicit.shape != external.shape:
        raise ValueError(f"need one implicit for each external reward, got {len(implicit)} and {len(external)}")
    weights = centring_weights(external, group, temperature=temperature)
    target = external - group_sum(weights * external, group)
    centred = crd_beta * (implicit - group_sum(weights * implicit.detach(), group))
    if form == "mse":
        return max_advantage / crd_beta * (centred - target).square().mean()
    if form == "bce":
        entropy = functional.binary_cross_entropy_with_logits(centred, torch.sigmoid(target))
        return max_advantage / crd_beta * entropy
    raise ValueError(f"form {form!r} is unknown; choose mse or bce")


def reward_adaptive_penalty(
    penalty: Tensor, external: Tensor, *, kl_weight: float = 0.1, lowest_weight: float = 1e-4
) -> Tensor:
    """mean of (lowest + r (kl_weight - lowest)) penalty, 0-dim: bad samples are hardly anchored, good ones fully.

    Args:
        penalty: [B], with graph.
        external: [B] r in [0, 1].
        kl_weight: weight at r = 1.
        lowest_weight: weight at r = 0.

    Raises:
        ValueError: an external reward is outside [0, 1], or not 0 <= lowest_weight <= kl_weight.
    """
    if not 0 <= lowest_weight <= kl_weight:
        raise ValueError(f"need 0 <= lowest_weight <= kl_weight, got {lowest_weight} and {kl_weight}")
    r = finite_values(external.detach(), "external rewards")
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError(f"external rewards must lie in [0, 1], got {float(r.min())} to {float(r.max())}")
    if penalty.shape != r.shape:
        raise ValueError(f"need one penalty for each reward, got {tuple(penalty.shape)} and {tuple(r.shape)}")
    return ((lowest_weight + r * (kl_weight - lowest_weight)) * penalty).mean()


class Crd:
    """CRD: samples of one older policy, compared with another; a group shares time and noise."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.crd is not None
        self.config, self.setup, self.settings = config, setup, config.crd

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.crd is not None
        snapshots = {"old_policy": config.crd.old, "sampling": config.crd.sampling}
        return Needs(reference=config.crd.kl_weight > 0, snapshots=snapshots)

    def plan(self, step: int) -> Plan:
        return reward_plan(self.config, step, len(self.setup.student.times))

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        return plain_step(self.config, self.setup.student.times, call, noise)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        # What a group shares drops out when the implicit reward is centred in it.
        return Prepared(draw, noise_samples(self.setup, rollout, rollout.shared(draw)) if rollout.plan.judged else None)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        return forward_calls(self.setup, rollout, prepared)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        matching, record = matching_term(self.config, self.setup, rollout, prepared, velocities)
        if rewards is None or prepared.noised is None:
            return matching, record
        loss, found = self.centred_loss(rollout, prepared.noised, velocities["noised"], rewards.advantages)
        return self.settings.policy_weight * loss + matching, {**found, **record}

    def centred_loss(self, rollout: Rollout, noised: NoisedSamples, velocity: Tensor, advantages: Tensor) -> Loss:
        """The loss for the student's velocity at the noised samples, with its pull to the start."""
        settings, target = self.settings, noised.eps - rollout.x0
        highest, group = settings.max_advantage, rollout.groups.groups.to(velocity.device)
        probability = optimality_probability(advantages, max_advantage=highest)
        implicit = implicit_reward(velocity, noised.old_velocity, target, adaptive=settings.adaptive)
        loss = crd_loss(implicit, probability, group, crd_beta=settings.crd_beta, max_advantage=highest)
        record = {
            "policy_loss": loss.detach(),
            "implicit_reward_rms": implicit.detach().square().mean().sqrt(),
            "old_policy_distance": (velocity - noised.old_velocity).detach().square().mean().sqrt(),
        }
        if noised.reference_velocity is None:
            return loss, record
        penalty = reference_penalty(velocity, noised.reference_velocity)
        weights = {"kl_weight": settings.kl_weight, "lowest_weight": settings.lowest_kl_weight}
        pull = reward_adaptive_penalty(penalty, probability, **weights)
        return loss + pull, {**record, "reference_penalty": penalty.mean().detach()}
