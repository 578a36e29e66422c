"""What one step of a run does and keeps: its plan, its rollouts, and policy gradients on their random steps.

Legend: n samples of one slice; states, velocities, x0 [n, C, h, w]; log ratios, advantages [n]; K calls of the student
at times t_0 > ... > t_{K-1}; the step after call j < K - 1 is random and leads to t_{j+1}, the last call gives the
sample itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw, sample_uniform, shared_integer
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.flow_sde import (
    Transition,
    cps_transition,
    distance_log_prob,
    flow_sde_diffusion,
    sde_transition,
    transition_kl,
    transition_log_prob,
)
from fewstep.dmd.reward.groups import SampleGroups
from fewstep.dmd.reward.inputs import finite_values
from fewstep.dmd.reward.sections import ChainConfig
from fewstep.dmd.reward.setup import RewardSetup

# Of a state that the student is called on: the number of a call of the rollout, or the samples noised anew.
CallKey: TypeAlias = int | Literal["noised"]

Velocities: TypeAlias = Mapping[CallKey, Tensor]
Loss: TypeAlias = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """What one step of the run does; a function of (seed, step), the same on all processes.

    Attributes:
        last: the last call of the rollout.
        matching_step: the call whose output is matched to the teacher, or None.
        policy_steps: random steps that get the policy loss.
        judged: whether samples are scored.
        shared_start: whether a group shares its noise up to the step of the preference.
        step: the number of the step.
        gan_step: the call whose decoded output the pixel discriminator sees, or None.
        followed_step: what the fake score is trained on where nothing is matched; None is the last call.
        keep_fake: what the fake score keeps when the student is mixed into it after the update; 1 mixes nothing.
    """

    last: int
    matching_step: int | None
    policy_steps: tuple[int, ...]
    judged: bool
    shared_start: bool
    step: int
    gan_step: int | None = None
    followed_step: int | None = None
    keep_fake: float = 1.0

    @property
    def fake_step(self) -> int:
        """The call whose output the fake score is trained on."""
        if self.matching_step is not None:
            return self.matching_step
        return self.last if self.followed_step is None else self.followed_step


@dataclass(frozen=True, eq=False)
class Rollout:
    """One slice of samples, without graph; states[j] is what call j was made on, predictions[j] its x0.

    `next_states` and `noises` belong to the random steps, `log_probs` [n] to those with the policy loss (under the
    unguided transition), `process_rewards` [n] and `guided_means` to the same with Euphonium, and `judgements` [n] to
    the step of Flash-DMD's pairs where a latent reward model judges them.
    """

    plan: Plan
    draw: Draw
    condition: Condition
    groups: SampleGroups
    prompts: list[str]
    states: tuple[Tensor, ...]
    predictions: tuple[Tensor, ...]
    next_states: tuple[Tensor, ...]
    noises: tuple[Tensor, ...]
    log_probs: tuple[Tensor, ...]
    process_rewards: tuple[Tensor, ...]
    guided_means: tuple[Tensor, ...] = ()
    judgements: tuple[Tensor, ...] = ()

    @property
    def x0(self) -> Tensor:
        """The samples: the prediction of the last call."""
        return self.predictions[-1]

    def shared(self, draw: Draw) -> Draw:
        """The draw in which all samples of a group have the numbers of its first one."""
        first: dict[int, int] = {}
        numbers = self.groups.groups.tolist()
        for group, index in zip(numbers, draw.indices, strict=True):
            first.setdefault(group, index)
        return Draw(draw.seed, [first[group] for group in numbers], draw.device)


@dataclass(frozen=True, eq=False)
class PolicyCall:
    """Call j of a policy: the state it was made on, its velocity, and what the samples are of."""

    x_t: Tensor
    velocity: Tensor
    j: int
    condition: Condition
    prompts: list[str]


@dataclass(frozen=True, eq=False)
class RandomStep:
    """Where a random step led, by which noise; the others belong to steps with the policy loss (`Rollout`)."""

    state: Tensor
    noise: Tensor
    log_prob: Tensor | None = None
    process_reward: Tensor | None = None
    guided_mean: Tensor | None = None
    judgement: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NoisedSamples:
    """Samples noised anew to x_t, their noise and time, and the velocities there of older policy and start."""

    x_t: Tensor
    t: Tensor
    eps: Tensor
    old_velocity: Tensor
    reference_velocity: Tensor | None


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the losses of one update on a slice need that no reward enters."""

    draw: Draw
    noised: NoisedSamples | None = None


def reward_plan(config: RewardRunConfig, step: int, calls: int, *, policy_steps: tuple[int, ...] = ()) -> Plan:
    """Whole rollouts that are scored, beside matching; in a cold start matching alone, of one call drawn as in DMD2."""
    matching = config.matching
    if matching is None:
        return Plan(calls - 1, None, policy_steps, judged=True, shared_start=False, step=step)
    any_step = shared_integer(config.run.seed, step, "matching_step", calls)
    if step < matching.cold_start_steps:
        return Plan(any_step, any_step, (), judged=False, shared_start=False, step=step)
    matched = any_step if matching.steps == "any" else calls - 1
    return Plan(calls - 1, matched, policy_steps, judged=True, shared_start=False, step=step)


def chain_plan(config: RewardRunConfig, chain: ChainConfig, step: int, calls: int) -> Plan:
    """`reward_plan` with the random steps that get the policy gradient, drawn of (seed, step)."""
    u = sample_uniform(config.run.seed, [0], (calls - 1,), step=step, stream="policy_steps")[0]
    steps = select_steps(u, first=0, count=chain.trained_steps or calls - 1)
    return reward_plan(config, step, calls, policy_steps=steps)


def select_steps(u: Tensor, *, first: int, count: int) -> tuple[int, ...]:
    """SubGRPO's steps of an epoch: `count` of first ... first + len(u) - 1, rising (RTDMD, arXiv:2605.26108).

    Args:
        u: [n] uniform numbers, one for each stochastic step, the same on all processes.
        first: number of the first stochastic step.
        count: how many steps get the policy loss.

    Raises:
        ValueError: count is not from 1 to n.
    """
    if u.ndim != 1 or not 1 <= count <= len(u):
        raise ValueError(f"count must be from 1 to the {u.numel()} stochastic steps, got {count}")
    return tuple(sorted(first + int(i) for i in u.argsort()[:count]))


def planned_calls(setup: RewardSetup, rollout: Rollout, *, last: bool = False) -> dict[CallKey, tuple[Tensor, Tensor]]:
    """The states (x, t) that the losses of the plan ask the student for, in order; `last` adds the last call."""
    plan, times = rollout.plan, setup.student.times
    steps = set(plan.policy_steps) | ({plan.last} if last else set())
    steps |= {j for j in (plan.matching_step, plan.gan_step) if j is not None}
    count, device = len(rollout.x0), rollout.x0.device
    return {j: (rollout.states[j], torch.full((count,), times[j], device=device)) for j in sorted(steps)}


def transition(config: RewardRunConfig, x_t: Tensor, velocity: Tensor, times: Sequence[float], j: int) -> Transition:
    """The step from times[j] to times[j + 1]; the student's own are CPS: eta 1 re-noises x0, eta 0 is Euler's."""
    settings = config.transition
    t, t_next = (torch.full((len(x_t),), times[k], dtype=x_t.dtype, device=x_t.device) for k in (j, j + 1))
    if settings.transition == "sampler":
        return cps_transition(x_t, velocity, t, t_next, eta=1.0 if config.student.sampler == "sde" else 0.0)
    if settings.transition == "cps":
        return cps_transition(x_t, velocity, t, t_next, eta=settings.eta)
    if settings.transition == "flow_sde":
        diffusion = flow_sde_diffusion(t, scale=settings.noise_scale, second_time=times[1])
    else:
        diffusion = torch.full_like(t, settings.noise_scale)
    return sde_transition(x_t, velocity, t, t_next, diffusion=diffusion)


def plain_step(config: RewardRunConfig, times: Sequence[float], call: PolicyCall, noise: Tensor) -> RandomStep:
    """The random step after a call, where no loss asks for more than its state."""
    return RandomStep(transition(config, call.x_t, call.velocity, times, call.j).draw(noise), noise)


def scored_step(
    config: RewardRunConfig, chain: ChainConfig, times: Sequence[float], call: PolicyCall, noise: Tensor
) -> RandomStep:
    """The random step after a call, with its log-probability for the policy gradient."""
    step = transition(config, call.x_t, call.velocity, times, call.j)
    state = step.draw(noise)
    return RandomStep(state, noise, log_prob(chain, state, step))


def log_prob(chain: ChainConfig, x_next: Tensor, step: Transition) -> Tensor:
    """[n], a mean over the elements."""
    return distance_log_prob(x_next, step) if chain.log_prob == "distance" else transition_log_prob(x_next, step)


@torch.no_grad()
def reference_mean(config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, j: int) -> Tensor:
    """The mean of random step j under the student at the start."""
    assert setup.reference is not None
    x_t, times = rollout.states[j], setup.student.times
    t = torch.full((len(x_t),), times[j], dtype=x_t.dtype, device=x_t.device)
    return transition(config, x_t, setup.reference(x_t, t, rollout.condition), times, j).mean


@dataclass(frozen=True, eq=False)
class ClippedSurrogate:
    """The policy loss (0-dim, with graph) and what it says about the step (0-dim, without).

    Attributes:
        loss: mean max(-A q, -A clip(q)).
        clipped_share: share of samples whose gradient the clip removed. Above 0.01 at the first update after a rollout,
            the log-probabilities of rollout and training do not agree (dtype, guidance, dropout).
        ratio_deviation: mean |q - 1|.
    """

    loss: Tensor
    clipped_share: Tensor
    ratio_deviation: Tensor

    @property
    def record(self) -> dict[str, Tensor]:
        """Metrics by name."""
        return {"clipped_share": self.clipped_share, "ratio_deviation": self.ratio_deviation}


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_range: float, advantage_clip: float = 5.0
) -> ClippedSurrogate:
    """mean max(-A q, -A clip(q, 1 - c, 1 + c)), q = exp(log_ratio) (PPO, arXiv:1707.06347, Eq. 7).

    At q = 1 the gradient is -mean A grad log pi. The clip keeps a step near the policy that made the samples, which
    also lets one rollout serve several updates: q is their importance weight.

    Args:
        log_ratio: [B], log pi - log pi_old of the stored transition, with graph; or a guarded ratio.
        advantages: [B], without graph.
        clip_range: c > 0. Flow-GRPO 1e-4, RTDMD 1e-5, both for log-probabilities averaged over elements.
        advantage_clip: advantages are clamped to plus or minus this.

    Raises:
        ValueError: an advantage is not finite, the shapes differ, or a range is not positive.
    """
    if clip_range <= 0 or advantage_clip <= 0:
        raise ValueError(f"clip_range and advantage_clip must be positive, got {clip_range} and {advantage_clip}")
    if log_ratio.shape != advantages.shape:
        raise ValueError(
            f"one log ratio for each advantage is needed, got {tuple(log_ratio.shape)} and {tuple(advantages.shape)}"
        )
    advantage = finite_values(advantages.detach(), "advantages").clamp(-advantage_clip, advantage_clip)
    ratio = log_ratio.exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return ClippedSurrogate(
        loss=torch.maximum(plain, clipped).mean(),
        clipped_share=(clipped > plain).to(ratio.dtype).mean().detach(),
        ratio_deviation=(ratio - 1).abs().mean().detach(),
    )


@dataclass(frozen=True, eq=False)
class PolicyStep:
    """Random step j of a rollout, number `place` of those with the policy loss, under the student of now.

    `log_ratio` [n] is log pi - log pi_old of the stored transition, with graph.
    """

    j: int
    place: int
    transition: Transition
    log_ratio: Tensor


def policy_steps(
    config: RewardRunConfig, chain: ChainConfig, times: Sequence[float], rollout: Rollout, velocities: Velocities
) -> list[PolicyStep]:
    """The random steps of the plan that get the policy loss; velocities are those of the student there."""
    found = []
    for place, j in enumerate(rollout.plan.policy_steps):
        step = transition(config, rollout.states[j], velocities[j], times, j)
        log_ratio = log_prob(chain, rollout.next_states[j], step) - rollout.log_probs[place]
        found.append(PolicyStep(j, place, step, log_ratio))
    return found


def with_kl(
    config: RewardRunConfig, setup: RewardSetup, chain: ChainConfig, rollout: Rollout, step: PolicyStep, loss: Loss
) -> Loss:
    """The loss of one random step with the KL to the student at the start, where it has a weight."""
    if chain.kl_weight == 0:
        return loss
    kl = transition_kl(step.transition, reference_mean(config, setup, rollout, step.j)).mean()
    return loss[0] + chain.kl_weight * kl, {**loss[1], "kl": kl.detach()}


def mean_over_steps(parts: Sequence[Loss]) -> Loss:
    """The mean loss and record of the random steps, as the policy loss."""
    loss = torch.stack([part for part, _ in parts]).mean()
    means = {name: torch.stack([record[name] for _, record in parts]).mean() for name in parts[0][1]}
    return loss, {"policy_loss": loss.detach(), **means}


def policy_loss(
    config: RewardRunConfig,
    setup: RewardSetup,
    chain: ChainConfig,
    rollout: Rollout,
    velocities: Velocities,
    advantages: Tensor,
) -> Loss:
    """The clipped policy gradient (Flow-GRPO, arXiv:2505.05470): mean over the plan's random steps, with the KL."""
    parts = []
    for step in policy_steps(config, chain, setup.student.times, rollout, velocities):
        surrogate = clipped_surrogate(
            step.log_ratio, advantages, clip_range=chain.clip_range, advantage_clip=chain.advantage_clip
        )
        parts.append(with_kl(config, setup, chain, rollout, step, (surrogate.loss, surrogate.record)))
    return mean_over_steps(parts)
