from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from fewstep.dmd.reward.config import ChainConfig, RewardRunConfig
from fewstep.dmd.reward.flow_sde import (
    Transition,
    cps_transition,
    distance_log_prob,
    flow_sde_diffusion,
    sde_transition,
    transition_log_prob,
)
from fewstep.dmd.reward.groups import SampleGroups
from fewstep.dmd.reward.latent.network import LatentScorer, latent_scores
from fewstep.dmd.reward.scores import RewardError
from fewstep.dmd.reward.setup import RewardSetup


@torch.no_grad()
def reference_mean(config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, j: int) -> Tensor:
    """The mean of random step j under the student at the start."""
    assert setup.reference is not None
    x_t, times = rollout.states[j], setup.student.times
    t = torch.full((len(x_t),), times[j], dtype=x_t.dtype, device=x_t.device)
    return transition(config, x_t, setup.reference(x_t, t, rollout.condition), times, j).mean


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
    """

    last: int
    matching_step: int | None
    policy_steps: tuple[int, ...]
    judged: bool
    shared_start: bool
    step: int
    gan_step: int | None = None
    followed_step: int | None = None

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


def latent_judgement(
    scorer: LatentScorer, x_t: Tensor, t: Tensor, condition: Condition, *, gradient: bool = False
) -> Tensor:
    """The latent scores [n]. Raises RewardError where they cannot be used, as for other scorers."""
    try:
        return latent_scores(scorer, x_t, t, condition, gradient=gradient)
    except ValueError as error:
        raise RewardError(f"the latent reward failed ({error})", clean=False) from error


def shared_draw(rollout: Rollout, draw: Draw) -> Draw:
    """The draw in which all samples of a group have the numbers of its first one."""
    first: dict[int, int] = {}
    numbers = rollout.groups.groups.tolist()
    for group, index in zip(numbers, draw.indices, strict=True):
        first.setdefault(group, index)
    return Draw(draw.seed, [first[group] for group in numbers], draw.device)


def transition(config: RewardRunConfig, x_t: Tensor, velocity: Tensor, times: Sequence[float], j: int) -> Transition:
    """The step from times[j] to times[j + 1]; the student's own are CPS: eta 1 re-noises x0, eta 0 is Euler's."""
    chain = config.chain
    t, t_next = (torch.full((len(x_t),), times[k], dtype=x_t.dtype, device=x_t.device) for k in (j, j + 1))
    if chain.transition == "sampler":
        return cps_transition(x_t, velocity, t, t_next, eta=1.0 if config.student.sampler == "sde" else 0.0)
    if chain.transition == "cps":
        return cps_transition(x_t, velocity, t, t_next, eta=chain.eta)
    if chain.transition == "flow_sde":
        diffusion = flow_sde_diffusion(t, scale=chain.noise_scale, second_time=times[1])
    else:
        diffusion = torch.full_like(t, chain.noise_scale)
    return sde_transition(x_t, velocity, t, t_next, diffusion=diffusion)


def log_prob(chain: ChainConfig, x_next: Tensor, step: Transition) -> Tensor:
    """[n], a mean over the elements."""
    return distance_log_prob(x_next, step) if chain.log_prob == "distance" else transition_log_prob(x_next, step)
