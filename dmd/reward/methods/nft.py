"""Policy improvement on the forward process: samples of an old policy are noised anew and regressed on with a sign.

DiffusionNFT (arXiv:2509.16117) and AdvantageFlow. No log-probability of a chain is needed, any sampler may produce
the samples. Legend: B samples of the old policy; predictions and targets [B, ...] at the same (x_t, t), either
velocities with target eps - x0 or x0 predictions with target x0; probability, advantages [B]. The old policy's
prediction gets no gradient. These losses train the prediction at each t; a student whose steps are jumps is not the
ODE of that prediction, and the papers report that plain NFT then hurts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32, x0_from_velocity
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
from fewstep.dmd.reward.inputs import finite_values, over_elements, reference_penalty
from fewstep.dmd.reward.matching import matching_term
from fewstep.dmd.reward.methods.forward import forward_calls, noise_samples
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import Needs, RewardSetup


def optimality_probability(advantages: Tensor, *, max_advantage: float = 5.0) -> Tensor:
    """1/2 + 1/2 clip(A / max_advantage, -1, 1), [B] in [0, 1], without graph (DiffusionNFT, arXiv:2509.16117).

    Raises:
        ValueError: an advantage is not finite, or max_advantage is not positive.
    """
    if max_advantage <= 0:
        raise ValueError(f"max_advantage must be positive, got {max_advantage}")
    values = finite_values(advantages.detach(), "advantages")
    return 0.5 + 0.5 * (values / max_advantage).clamp(-1, 1)


def nft_loss(
    prediction: Tensor, old_prediction: Tensor, target: Tensor, probability: Tensor, *, nft_beta: float
) -> Tensor:
    """mean r |p+ - target|^2 + (1 - r) |p- - target|^2 with the branches p+- = (1 -+ beta) old +- beta p.

    With velocities the loss of DiffusionNFT (arXiv:2509.16117); with x0 predictions Astrolabe's (arXiv:2603.17051),
    which drops the adaptive weight. Its gradient is that of beta^2 |p - (old + (2 r - 1) (target - old) / beta)|^2:
    regression on a target extrapolated along or against the sample. With the old policy held, the minimiser is
    old + Cov(2 r - 1, target | x_t) / beta; for a Gaussian and r linear with slope k the exact tilt
    e^{(2 k / beta) x}. Each epoch tilts again; a penalty kl_weight |p - reference|^2 beside it ends at the tilt
    2 k beta / kl_weight of the reference (our derivation).

    Args:
        prediction: [B, ...] of the policy, with graph.
        old_prediction: [B, ...] of the snapshot that made the samples.
        target: [B, ...].
        probability: [B] r in [0, 1].
        nft_beta: strength of the interpolation, positive; a smaller one makes a larger step.

    Raises:
        ValueError: the shapes differ, a probability is outside [0, 1], or nft_beta is not positive.
    """
    positive, negative = _branches(prediction, old_prediction, target, nft_beta)
    r = _checked_probability(probability)
    target = at_least_fp32(target.detach())
    errors = [over_elements((branch - target).square(), "mean") for branch in (positive, negative)]
    return (r * errors[0] + (1 - r) * errors[1]).mean()


def adaptive_nft_loss(
    x0_prediction: Tensor,
    old_x0_prediction: Tensor,
    x0: Tensor,
    probability: Tensor,
    *,
    nft_beta: float,
    max_advantage: float = 5.0,
) -> Tensor:
    """max_advantage / beta mean(r l+ + (1 - r) l-), l = mean (x0_pred - x0)^2 / mean |x0_pred - x0| of each branch.

    DiffusionNFT as released. At the old policy the gradient depends neither on beta nor on max_advantage. On the coarse
    time grids of few-step students the divisor can run away (Astrolabe): use `nft_loss` there.

    Raises:
        ValueError: as `nft_loss`; or max_advantage is not positive.
    """
    if max_advantage <= 0:
        raise ValueError(f"max_advantage must be positive, got {max_advantage}")
    positive, negative = _branches(x0_prediction, old_x0_prediction, x0, nft_beta)
    r = _checked_probability(probability)
    x0 = at_least_fp32(x0.detach())
    errors = [
        over_elements((branch - x0).square(), "mean") / direction_normaliser(branch, x0)
        for branch in (positive, negative)
    ]
    return max_advantage / nft_beta * (r * errors[0] + (1 - r) * errors[1]).mean()


def ramped_decay(step: int, *, start: float = 0.0, delay: int = 0, slope: float = 0.001, ceiling: float = 0.5) -> float:
    """min(start + slope max(step - delay, 0), ceiling): decay of a snapshot, old <- decay old + (1 - decay) policy.

    `step` counts optimizer steps. DiffusionNFT: slope 0.001, ceiling 0.5; for text rendering delay 75, slope 0.0075,
    ceiling 0.999. CRD's reference of the loss: start 0.25, slope 0.005, ceiling 0.999. 0 copies the policy, 1
    freezes.

    Raises:
        ValueError: an argument is out of range.
    """
    if step < 0 or delay < 0 or slope < 0 or not 0 <= start <= ceiling <= 1:
        raise ValueError(
            f"need step, delay, slope >= 0 and 0 <= start <= ceiling <= 1, got {step}, {delay}, {slope}, "
            f"{start}, {ceiling}"
        )
    return min(start + slope * max(step - delay, 0), ceiling)


def _branches(prediction: Tensor, old: Tensor, target: Tensor, nft_beta: float) -> tuple[Tensor, Tensor]:
    _require_beta(nft_beta)
    require_same_shape(prediction=prediction, old_prediction=old, target=target)
    prediction, old = at_least_fp32(prediction), at_least_fp32(old.detach())
    # old + beta (p - old) rather than (1 - beta) old + beta p: both branches are exactly old at p = old.
    move = nft_beta * (prediction - old)
    return old + move, old - move


def _require_beta(nft_beta: float) -> None:
    if nft_beta <= 0:
        raise ValueError(f"nft_beta must be positive, got {nft_beta}; DiffusionNFT uses 1 and 0.1")


def _checked_probability(probability: Tensor) -> Tensor:
    values = finite_values(probability.detach(), "probabilities")
    if not bool(((values >= 0) & (values <= 1)).all()):
        low, high = torch.aminmax(values)
        raise ValueError(f"probabilities must lie in [0, 1], got {float(low)} to {float(high)}")
    return values


class Nft:
    """DiffusionNFT: samples of an older policy, noised anew, and a pull to the student at the start."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.nft is not None
        self.config, self.setup, self.settings = config, setup, config.nft

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.nft is not None
        return Needs(reference=config.nft.kl_weight > 0, snapshots={"old_policy": config.nft.old})

    def plan(self, step: int) -> Plan:
        return reward_plan(self.config, step, len(self.setup.student.times))

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        return plain_step(self.config, self.setup.student.times, call, noise)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        return Prepared(draw, noise_samples(self.setup, rollout, draw) if rollout.plan.judged else None)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        return forward_calls(self.setup, rollout, prepared)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        matching, record = matching_term(self.config, self.setup, rollout, prepared, velocities)
        if rewards is None or prepared.noised is None:
            return matching, record
        loss, found = self.signed_loss(rollout, prepared.noised, velocities["noised"], rewards.advantages)
        return self.settings.policy_weight * loss + matching, {**found, **record}

    def signed_loss(self, rollout: Rollout, noised: NoisedSamples, velocity: Tensor, advantages: Tensor) -> Loss:
        """The loss for the student's velocity at the noised samples, with its pull to the start."""
        beta, highest = self.settings.nft_beta, self.settings.max_advantage
        probability = optimality_probability(advantages, max_advantage=highest)
        x0, old_x0 = (x0_from_velocity(noised.x_t, v, noised.t) for v in (velocity, noised.old_velocity))
        if self.settings.adaptive:
            loss = adaptive_nft_loss(x0, old_x0, rollout.x0, probability, nft_beta=beta, max_advantage=highest)
        else:
            loss = nft_loss(x0, old_x0, rollout.x0, probability, nft_beta=beta)
        distance = (velocity - noised.old_velocity).detach().square().mean().sqrt()
        record = {"policy_loss": loss.detach(), "old_policy_distance": distance}
        if noised.reference_velocity is None:
            return loss, record
        penalty = reference_penalty(velocity, noised.reference_velocity).mean()
        return loss + self.settings.kl_weight * penalty, {**record, "reference_penalty": penalty.detach()}
