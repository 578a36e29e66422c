"""RTDMD's second stage (arXiv:2605.26108): distribution matching with a reward, KL(student || teacher e^{lambda r}).

grad KL(student || tilted) = grad KL(student || teacher) - lambda grad E r. The first term is (AC-)DMD. The second is
a hybrid gradient: stochastic steps by policy gradient (`clipped_surrogate` on `transition_log_prob` or
`distance_log_prob`), the deterministic last step by the reward's own gradient, because it has no log-probability.
Each part alone is biased; the last step's x_t is the stored one, without graph, so nothing is counted twice. Written
after the released code; proofs and ablations of the paper were not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.dmd.loss import direction_normaliser
from fewstep.dmd.reward.chain import (
    CallKey,
    Loss,
    Plan,
    PolicyCall,
    Prepared,
    RandomStep,
    Rollout,
    Velocities,
    chain_plan,
    plain_step,
    planned_calls,
    policy_loss,
    scored_step,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.inputs import finite_values
from fewstep.dmd.reward.matching import ComparedScores, match_call, require_matching
from fewstep.dmd.reward.methods.tilted_teacher import tilted_teacher_term
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.sections import DirectConfig
from fewstep.dmd.reward.setup import Needs, RewardSetup
from fewstep.evaluation.scorers.chunks import through_chunks


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


class Rtdmd:
    """RTDMD: matching, policy gradients on random steps, and the reward's own gradient on the last."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.rtdmd is not None
        self.config, self.setup, self.settings = config, setup, config.rtdmd

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.rtdmd is not None
        needs, tilted = direct_needs(config.rtdmd.direct, config.rtdmd.kl_weight), config.rtdmd.tilted_teacher
        return needs if tilted is None else replace(needs, reward_gradient=True, followed=tilted.scorers)

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
        weights = {"matching_weight": require_matching(config).weight, "reward_weight": 0.0}
        policy = direct = rollout.x0.new_zeros(())
        record: dict[str, Tensor] = {}
        if rewards is not None:
            policy, record = policy_loss(config, setup, settings, rollout, velocities, rewards.advantages)
        matched = match_call(config, setup, rollout, velocities, draw=prepared.draw)
        matching, tilted, record = matched.loss, settings.tilted_teacher, {**record, **matched.record}
        if tilted is not None and rewards is not None and matched.scores is not None:
            added, found = tilted_teacher_term(config, setup, tilted, rollout, matched.scores, draw=prepared.draw)
            matching, record = matching + added, {**record, **found}
        if matched.scores is not None:
            record |= tilt_record(settings.direct, setup, matched.scores, weight=weights["matching_weight"])
        if rewards is not None and settings.direct is not None:
            direct, found = direct_term(setup, settings.direct, rollout, velocities)
            weights["reward_weight"], record = settings.direct.weight, {**record, **found}
        return hybrid_loss(settings.policy_weight * policy, matching, direct, **weights), record


def direct_needs(direct: DirectConfig | None, kl_weight: float) -> Needs:
    """What a policy gradient with a direct term needs."""
    there = direct is not None
    followed = () if direct is None else direct.scorers
    return Needs(reference=kl_weight > 0, reward_gradient=there, followed=followed, teacher_spread=there)


def direct_term(setup: RewardSetup, direct: DirectConfig, rollout: Rollout, velocities: Velocities) -> Loss:
    """`direct_reward_loss` of the last call's prediction, through decoder and scorers, `reward.chunk` at a time."""
    state, last = rollout.states[rollout.plan.last], rollout.plan.last
    t = torch.full((len(state),), setup.student.times[last], device=state.device)
    x0 = x0_from_velocity(state, velocities[last], t)

    def part(x: Tensor, rows: slice) -> Tensor:
        rewards = setup.reward.followed_total(setup.teacher.decode(x), rollout.prompts[rows])
        return direct_reward_loss(rewards, margin=direct.margin) * len(x)

    term = through_chunks(part, x0, chunk=setup.reward.settings.chunk) / len(x0)
    return term, {"direct_loss": term.detach()}


@torch.no_grad()
def tilt_record(
    direct: DirectConfig | None, setup: RewardSetup, scores: ComparedScores, *, weight: float
) -> dict[str, Tensor]:
    """The lambda of e^(lambda reward) at which a Gaussian student would rest under matching and the direct term.

    Over all elements, and for the mean along the thinnest and the widest directions of the teacher's latents, where it
    differs. Nothing without the direct term; `weight` is that of matching.
    """
    if direct is None:
        return {}
    assert setup.teacher_spread is not None
    x0, spread, normaliser = scores.x0, setup.teacher_spread, direction_normaliser(scores.x0, scores.real_x0)
    total, thin, wide = (
        effective_tilt(
            scores.t,
            reward_weight=direct.weight,
            matching_weight=weight,
            elements=x0[0].numel(),
            teacher_variance=x0.new_tensor(variance),
            student_variance=x0.var(),
            normaliser=normaliser,
        )
        for variance in (spread.total, spread.thin, spread.wide)
    )
    whole = {"effective_tilt_mean": total.mean, "effective_tilt_spread": total.spread}
    return {**whole, "effective_tilt_thin": thin.mean, "effective_tilt_wide": wide.mean}
