"""RTDMD's second stage (arXiv:2605.26108): distribution matching with a reward, KL(student || teacher e^{lambda r}).

grad KL(student || tilted) = grad KL(student || teacher) - lambda grad E r. The first term is (AC-)DMD. The second is
a hybrid gradient: stochastic steps by policy gradient (`grpo.clipped_surrogate` on `transition_log_prob` or
`distance_log_prob`), the deterministic last step by the reward's own gradient, because it has no log-probability.
Each part alone is biased; the last step's x_t is the stored one, without graph, so nothing is counted twice. Written
after the released code; proofs and ablations of the paper were not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32
from fewstep.dmd.loss import direction_normaliser
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.inputs import finite_values
from fewstep.dmd.reward.setup import RewardSetup


def direct_reward_loss(rewards: Tensor, *, margin: float = 3.0) -> Tensor:
    """mean relu(margin - r): the reward's own gradient on the samples of the deterministic step.

    With the rewards of RTDMD's code (their sum stays below 1.7) the hinge never binds and this is -mean r; a reward
    above the margin gets no gradient, so choose the margin for the scale of the reward, or infinity's stand-in far
    above it.

    Args:
        rewards: [B] with the graph through decoder and scorer to the sample.
        margin: see above.

    Raises:
        ValueError: a reward is not finite, or carries no graph.
    """
    if not rewards.requires_grad:
        raise ValueError("the rewards carry no gradient; use a differentiable scorer, without no_grad")
    return torch.relu(margin - finite_values(rewards, "rewards")).mean()


def hybrid_loss(
    policy_loss: Tensor,
    matching_loss: Tensor,
    reward_loss: Tensor,
    *,
    matching_weight: float = 1e-3,
    reward_weight: float = 1e-4,
) -> Tensor:
    """policy + matching_weight matching + reward_weight reward; the weights are those of RTDMD's configurations.

    reward_weight / matching_weight is not the temperature of the tilt: see `effective_tilt`.

    Raises:
        ValueError: a weight is negative.
    """
    if matching_weight < 0 or reward_weight < 0:
        raise ValueError(f"weights must not be negative, got {matching_weight} and {reward_weight}")
    return policy_loss + matching_weight * matching_loss + reward_weight * reward_loss


@dataclass(frozen=True, eq=False)
class EffectiveTilt:
    """lambda of the tilt e^{lambda r} at which a Gaussian student comes to rest; 0-dim.

    Attributes:
        mean: what the student's mean obeys.
        spread: what its variance obeys. The two agree when scores are compared at small t alone: at a larger t
            distribution matching holds the variance less than the mean.
    """

    mean: Tensor
    spread: Tensor


def effective_tilt(
    t: Tensor,
    *,
    reward_weight: float,
    matching_weight: float,
    elements: int,
    teacher_variance: Tensor,
    student_variance: Tensor,
    normaliser: Tensor | None = None,
) -> EffectiveTilt:
    """lambda_eff of matching_weight distribution_matching_loss + reward_weight mean(-r), in a Gaussian model.

    With a = 1 - t, D = a^2 S + t^2, V = a^2 S' + t^2 for data of variance S and a student of variance S': mean
    reward_weight elements / (matching_weight S E[t^2 / (D n)]), spread the same with S S' E[a^2 t^2 / (D V n)].
    `elements` enters because the matching loss is a mean over the elements of a sample. Our derivation; a figure to
    report in place of reward_weight / matching_weight.

    Args:
        t: [B] times at which the scores were compared.
        reward_weight: total weight of the reward, direct and policy parts added when one parameter serves both.
        matching_weight: of `distribution_matching_loss`.
        elements: number of elements of a sample.
        teacher_variance: 0-dim, variance of the teacher's samples, per element.
        student_variance: 0-dim, that of the student.
        normaliser: [B] of `direction_normaliser`; None is one.

    Raises:
        ValueError: matching_weight is not positive (the tilt would have no end).
    """
    if matching_weight <= 0:
        raise ValueError(
            f"matching_weight must be positive, got {matching_weight}: without it the reward has no anchor"
        )
    t = at_least_fp32(t.detach())
    n = torch.ones_like(t) if normaliser is None else normaliser.detach()
    signal = (1 - t).square()
    d, v = signal * teacher_variance + t.square(), signal * student_variance + t.square()
    ratio = reward_weight * elements / matching_weight
    by_mean = teacher_variance * (t.square() / (d * n)).mean()
    by_spread = teacher_variance * student_variance * (signal * t.square() / (d * v * n)).mean()
    return EffectiveTilt(mean=ratio / by_mean, spread=ratio / by_spread)


@torch.no_grad()
def tilt_record(
    config: RewardRunConfig, setup: RewardSetup, x0: Tensor, real_x0: Tensor, *, t: Tensor
) -> dict[str, Tensor]:
    """The lambda of e^(lambda reward) at which a Gaussian student would rest under matching and the direct term."""
    if setup.teacher_variance is None:
        return {}
    tilt = effective_tilt(
        t,
        reward_weight=config.objective.direct_weight,
        matching_weight=config.objective.matching_weight,
        elements=x0[0].numel(),
        teacher_variance=x0.new_tensor(setup.teacher_variance),
        student_variance=x0.var(),
        normaliser=direction_normaliser(x0, real_x0),
    )
    return {"effective_tilt_mean": tilt.mean, "effective_tilt_spread": tilt.spread}
