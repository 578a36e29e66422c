"""Flash-DMD (arXiv:2511.20549): losses routed by noise level, a fake score near the student, latent preferences.

Written after a summary of the paper with its equations; no code is public. Legend: B batch; x_win, x_lose, means [B,
...]; t [B]; P start states, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32, x0_from_velocity
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.shapes import require_same_shape
from fewstep.core.training.roles import frozen
from fewstep.dmd.gan_loss import generator_gan_loss
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
    reference_mean,
    transition,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.flow_sde import Transition
from fewstep.dmd.reward.groups import route_steps
from fewstep.dmd.reward.inputs import Reduction, finite_values, over_elements
from fewstep.dmd.reward.matching import matching_term, require_matching
from fewstep.dmd.reward.scores import SliceRewards, latent_judgement
from fewstep.dmd.reward.setup import Needs, RewardSetup


def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [P] of the highest and of the lowest of K candidates from one state, scores [P, K].

    Raises:
        ValueError: a score is not finite, K < 2, or all candidates of a state score the same.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [P, K] with K >= 2 candidates, got {tuple(scores.shape)}")
    finite_values(scores.flatten(), "scores")
    tied = (scores.amax(dim=1) == scores.amin(dim=1)).nonzero().flatten().tolist()
    if tied:
        raise ValueError(f"all candidates of states {tied} score the same, there is no pair; leave those states out")
    return scores.argmax(dim=1), scores.argmin(dim=1)


def preference_margin(
    x_win: Tensor, x_lose: Tensor, transition: Transition, reference_mean: Tensor, *, reduction: Reduction = "sum"
) -> Tensor:
    """[log p(win) - log p_ref(win)] - [the same of lose] of Gaussian transitions from one state, [B].

    Both policies have the std of `transition`, so the margin is (win - lose) (mean - reference) / std^2. The gradient
    reaches transition.mean alone.

    Raises:
        ValueError: the shapes differ, or the step is deterministic.
    """
    require_same_shape(x_win=x_win, x_lose=x_lose, mean=transition.mean, reference_mean=reference_mean)
    if not bool((transition.std > 0).all()):
        raise ValueError("a deterministic step (std 0) has no preference margin; draw pairs at earlier steps")
    moved = transition.mean - at_least_fp32(reference_mean.detach())
    apart = at_least_fp32(x_win.detach()) - at_least_fp32(x_lose.detach())
    return over_elements(apart * moved / transition.std.square(), reduction)


def preference_loss(margin: Tensor, *, dpo_beta: float, weight: Tensor | None = None) -> Tensor:
    """-mean weight log sigmoid(dpo_beta margin); log 2 at the reference (DPO, arXiv:2305.18290, Eq. 7, on transitions).

    For pairs of the reference that win with probability sigmoid(r_win - r_lose) the optimum is the transition tilted
    by e^{r / dpo_beta}. Pairs whose winner is certain (best against worst) have no optimum: the margin grows as long
    as one trains, and distillation in between is what holds it (the paper alternates 5 updates with 1 of matching).

    Args:
        margin: [B] of `preference_margin`.
        dpo_beta: scale of the margin, positive. Its value in the paper was not found.
        weight: [B], None is one.

    Raises:
        ValueError: a margin is not finite, or dpo_beta is not positive.
    """
    if dpo_beta <= 0:
        raise ValueError(f"dpo_beta must be positive, got {dpo_beta}")
    loss = -functional.logsigmoid(dpo_beta * finite_values(margin, "margins"))
    return loss.mean() if weight is None else (weight * loss).mean()


class Flash:
    """Flash-DMD: matching in one step, then pairs from one state in the next `updates_per_matching`."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.flash is not None
        self.config, self.setup, self.settings = config, setup, config.flash

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.flash is not None
        return Needs(reference=True, latent_reward=config.flash.latent_reward, pixel_gan=config.flash.pixel_gan)

    def plan(self, step: int) -> Plan:
        """At first matching alone (stage 1), then pairs in between.

        The pixel GAN trains one of the late calls in every step, in those of pairs, too: without it the paper's second
        stage collapses. With 'early' matching the others are matched, and the fake score follows them in every step.
        """
        matching, gan, seed = require_matching(self.config), self.settings.pixel_gan, self.config.run.seed
        times = self.setup.student.times
        calls, cold, followed, gan_step = len(times), step < matching.cold_start_steps, None, None
        if gan is not None:
            late = route_steps(times, boundary=gan.boundary)[1]
            gan_step = late[shared_integer(seed, step, "gan_step", len(late))]
        if gan is not None and matching.steps == "early":
            early = route_steps(times, boundary=gan.boundary)[0]
            matched = followed = early[shared_integer(seed, step, "matching_step", len(early))]
        elif cold or matching.steps == "any":
            matched = shared_integer(seed, step, "matching_step", calls)
        else:
            matched = calls - 1
        if cold or step % (self.settings.updates_per_matching + 1) == 0:
            last, kept = matched if gan_step is None else max(matched, gan_step), self.settings.inject_decay
            return Plan(
                last, matched, (), judged=False, shared_start=False, step=step, gan_step=gan_step, keep_fake=kept
            )
        return Plan(
            calls - 1,
            None,
            (shared_integer(seed, step, "preference_step", calls - 1),),
            judged=self.settings.latent_reward is None,
            shared_start=True,
            step=step,
            gan_step=gan_step,
            followed_step=followed,
        )

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        """The noisy candidate itself is judged, at its own time, where a latent reward model does it."""
        times = self.setup.student.times
        step = plain_step(self.config, times, call, noise)
        if not trained or self.setup.latent_reward is None:
            return step
        x_t = step.state
        t = torch.full((len(x_t),), times[call.j + 1], dtype=x_t.dtype, device=x_t.device)
        judgement = latent_judgement(self.setup.latent_reward, x_t, t, call.condition)
        return RandomStep(x_t, noise, judgement=judgement)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        return Prepared(draw)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        return planned_calls(self.setup, rollout)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        loss, record = rollout.x0.new_zeros(()), {}
        for j in rollout.plan.policy_steps:
            scores = rollout.judgements[0] if rewards is None else rewards.total
            pairs, found = self.pair_loss(rollout, j, velocity=velocities[j], scores=scores)
            loss, record = self.settings.policy_weight * pairs, {"policy_loss": pairs.detach(), **found}
        matching, found = matching_term(self.config, self.setup, rollout, prepared, velocities)
        loss, record = loss + matching, {**record, **found}
        gan, gan_step = self.settings.pixel_gan, rollout.plan.gan_step
        if gan is not None and gan_step is not None:
            adversarial, found = pixel_gan_loss(self.setup, rollout, gan_step, velocity=velocities[gan_step])
            loss, record = loss + gan.weight * adversarial, {**record, **found}
        return loss, record

    def pair_loss(self, rollout: Rollout, j: int, *, velocity: Tensor, scores: Tensor) -> Loss:
        """The preference of the best over the worst of each group, which left step j from one state.

        `scores` [n] are those of a latent reward model at the noisy candidates, as in the paper, or by default the
        rewards of the finished samples, all later noise being shared (our reading). Groups whose samples all score the
        same have no pair and add nothing.
        """
        config, size = self.config, self.config.reward.group_size
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
        step = transition(config, rollout.states[j][start], velocity[start], self.setup.student.times, j)
        reference = reference_mean(config, self.setup, rollout, j)[start]
        nexts = rollout.next_states[j]
        margin = preference_margin(nexts[win], nexts[lose], step, reference, reduction="mean")
        loss = preference_loss(margin, dpo_beta=self.settings.dpo_beta)
        return loss * record["pair_share"], {**record, "margin": margin.detach().mean()}


def pixel_gan_loss(setup: RewardSetup, rollout: Rollout, j: int, *, velocity: Tensor) -> Loss:
    """The student's non-saturating loss on the decoded prediction of call j; `velocity` carries its graph.

    Flash-DMD (arXiv:2511.20549), stage 1: late steps learn texture from real pictures instead of from scores.
    """
    assert setup.pixel_role is not None
    state = rollout.states[j]
    t = torch.full((len(state),), setup.student.times[j], dtype=state.dtype, device=state.device)
    discriminator = setup.pixel_role.module
    with frozen(discriminator):
        logits = discriminator(setup.teacher.decode(x0_from_velocity(state, velocity, t)))
    loss = generator_gan_loss(logits)
    return loss, {"student_gan_loss": loss.detach()}
