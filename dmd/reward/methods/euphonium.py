"""Euphonium (arXiv:2602.04928): rollouts steered by the gradient of a process reward, and rewards of two kinds.

Written after the released code and a summary of the paper. The process reward R(x_t, t) scores noisy latents; its
gradient is with respect to x_t, never through the policy. Legend: B batch; x_t, gradients [B, ...]; t, t_next [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32, expand_time, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.shapes import expand_weight, require_same_shape
from fewstep.dmd.reward.chain import (
    CallKey,
    ClippedSurrogate,
    Loss,
    Plan,
    PolicyCall,
    PolicyStep,
    Prepared,
    RandomStep,
    Rollout,
    Velocities,
    chain_plan,
    clipped_surrogate,
    log_prob,
    mean_over_steps,
    plain_step,
    planned_calls,
    policy_steps,
    transition,
    with_kl,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.flow_sde import Transition, transition_kl
from fewstep.dmd.reward.inputs import Reduction, finite_values
from fewstep.dmd.reward.matching import matching_term
from fewstep.dmd.reward.scores import SliceRewards, latent_judgement
from fewstep.dmd.reward.setup import Needs, RewardSetup


def guided_transition(transition: Transition, reward_gradient: Tensor, scale: Tensor) -> Transition:
    """The transition with mean + scale grad R and the same std; scale [B]. 0 leaves it exactly as it is.

    Samples are drawn from the guided transition, while log-probabilities, in rollout and training, are taken under the
    unguided one: samples with a positive advantage then pull the policy to the guided drift, and no reward model is
    needed at inference. No gradient reaches reward_gradient.

    Raises:
        ValueError: the shapes differ, or the gradient is not finite.
    """
    require_same_shape(mean=transition.mean, reward_gradient=reward_gradient)
    gradient = at_least_fp32(reward_gradient.detach())
    finite_values(gradient.flatten(1).sum(dim=1), "reward gradients")
    return Transition(transition.mean + expand_weight(scale, gradient) * gradient, transition.std)


def step_scale(t: Tensor, t_next: Tensor, *, guidance: float) -> Tensor:
    """guidance (t - t_next), [B]: the scale in proportion to the step."""
    return guidance * (at_least_fp32(t) - at_least_fp32(t_next))


def langevin_scale(t: Tensor, t_next: Tensor, diffusion: Tensor, *, tilt_scale: float) -> Tensor:
    """tilt_scale g^2 (t - t_next) / 2, [B]: the noise part of sampling p_t e^{tilt_scale R}.

    The released code writes g^2 step / (2 kl_weight). Only the corrector is tilted, not the flow: the sampler reaches
    less than the tilt. `tilted_velocity` adds what is missing.
    """
    return tilt_scale * at_least_fp32(diffusion).square() * (at_least_fp32(t) - at_least_fp32(t_next)) / 2


def tilted_velocity(velocity: Tensor, reward_gradient: Tensor, t: Tensor, *, tilt_scale: float) -> Tensor:
    """v - t / (1 - t) tilt_scale grad R: the velocity whose score is that of p_t e^{tilt_scale R}.

    With tilt_scale R the log of E[e^{tilt_scale r(x0)} | x_t] and this velocity in `sde_transition`, samples follow
    the tilt e^{tilt_scale r} of the data exactly; our derivation from v = -(x_t + t score) / (1 - t). Not defined at
    t = 1.

    Raises:
        ValueError: the shapes differ, or a time is not inside [0, 1).
    """
    require_same_shape(velocity=velocity, reward_gradient=reward_gradient)
    if not bool(((t >= 0) & (t < 1)).all()):
        raise ValueError(f"times must lie in [0, 1), where the state says something of the reward, got {t.tolist()}")
    now = expand_time(t, velocity)
    return at_least_fp32(velocity) - now / (1 - now) * tilt_scale * at_least_fp32(reward_gradient.detach())


def unit_gradient(gradient: Tensor, *, floor: float = 1e-8) -> Tensor:
    """The gradient of each sample divided by its Euclidean norm (at least `floor`), [B, ...]."""
    gradient = at_least_fp32(gradient.detach())
    norm = gradient.flatten(1).norm(dim=1).clamp(min=floor)
    return gradient / expand_weight(norm, gradient)


def dual_surrogate(
    log_ratio: Tensor,
    outcome_advantages: Tensor,
    process_advantages: Tensor,
    *,
    outcome_weight: float = 1.0,
    process_weight: float = 1.0,
    clip_range: float = 1e-4,
    advantage_clip: float = 5.0,
) -> tuple[Tensor, ClippedSurrogate, ClippedSurrogate]:
    """outcome_weight PPO(outcome) + process_weight PPO(process) of one step, with both parts.

    The outcome's advantages are those of the finished sample, the process' those of R(x_t, t) at this step,
    normalised in the group at this step. Where the process reward is off its advantages are zero and the part is
    exactly zero.

    Raises:
        ValueError: an advantage is not finite, or the shapes differ.
    """
    outcome = clipped_surrogate(log_ratio, outcome_advantages, clip_range=clip_range, advantage_clip=advantage_clip)
    process = clipped_surrogate(log_ratio, process_advantages, clip_range=clip_range, advantage_clip=advantage_clip)
    return outcome_weight * outcome.loss + process_weight * process.loss, outcome, process


def guidance_distillation_loss(transition: Transition, guided_mean: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """mean KL(policy's transition || guided transition) = |mean - guided_mean|^2 / (2 std^2), 0-dim.

    Puts the guidance into the policy directly, without advantages. Our addition: the released code distils only through
    the unguided log-probabilities, and the paper's formal objective was not at hand.

    Raises:
        ValueError: the shapes differ, or the step is deterministic.
    """
    return transition_kl(transition, guided_mean, reduction=reduction).mean()


def process_gradient(rewards: Tensor, x_t: Tensor) -> Tensor:
    """d sum(rewards) / d x_t, [B, ...], without graph; R of a sample depends on that sample alone.

    Raises:
        ValueError: a reward is not finite, or does not depend on x_t.
    """
    if not rewards.requires_grad or not x_t.requires_grad:
        raise ValueError("the process reward must depend on x_t: call it on a detached copy with requires_grad")
    (gradient,) = torch.autograd.grad(finite_values(rewards, "process rewards").sum(), x_t)
    return gradient


class Euphonium:
    """Euphonium: Flow-GRPO on steered rollouts, with advantages of the process reward and a regression on the guidance.

    Raises ValueError when the latent judge has no random step to judge.
    """

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.euphonium is not None
        self.config, self.setup, self.settings = config, setup, config.euphonium
        random = setup.student.times[:-1]
        highest = self.settings.highest_time
        if self.settings.latent_reward is not None and not any(t <= highest for t in random):
            raise ValueError(
                f"euphonium.highest_time {highest} leaves none of the random steps at "
                f"{', '.join(f'{t:g}' for t in random)} to the latent judge; take a student of more steps, or raise it"
            )

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        settings = config.euphonium
        assert settings is not None
        return Needs(
            reference=settings.kl_weight > 0,
            reward_gradient=settings.latent_reward is None,
            latent_reward=settings.latent_reward,
        )

    def plan(self, step: int) -> Plan:
        return chain_plan(self.config, self.settings, step, len(self.setup.student.times))

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        """Steered where it is trained; the log-probability is that of the unguided transition."""
        times = self.setup.student.times
        if not trained:
            return plain_step(self.config, times, call, noise)
        step = transition(self.config, call.x_t, call.velocity, times, call.j)
        guided, rewards = self.steered(step, call)
        state = guided.draw(noise)
        return RandomStep(state, noise, log_prob(self.settings, state, step), rewards, guided.mean)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        return Prepared(draw)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        return planned_calls(self.setup, rollout)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        matching, record = matching_term(self.config, self.setup, rollout, prepared, velocities)
        if rewards is None:
            return matching, record
        policy, found = self.dual_loss(rollout, velocities, rewards)
        return self.settings.policy_weight * policy + matching, {**found, **record}

    def dual_loss(self, rollout: Rollout, velocities: Velocities, rewards: SliceRewards) -> Loss:
        """Mean over the random steps of the surrogates of outcome and process, with the regression and the KL."""
        config, settings, parts = self.config, self.settings, []
        for step in policy_steps(config, settings, self.setup.student.times, rollout, velocities):
            advantages = (rewards.advantages, rewards.process[step.place])
            loss, surrogate, _ = dual_surrogate(
                step.log_ratio,
                *advantages,
                process_weight=settings.process_weight,
                clip_range=settings.clip_range,
                advantage_clip=settings.advantage_clip,
            )
            record = surrogate.record
            if settings.distill_weight > 0:
                distilled = self.distillation(rollout, step)
                loss = loss + settings.distill_weight * distilled
                record["distill_loss"] = distilled.detach()
            parts.append(with_kl(config, self.setup, settings, rollout, step, (loss, record)))
        return mean_over_steps(parts)

    def distillation(self, rollout: Rollout, step: PolicyStep) -> Tensor:
        """`guidance_distillation_loss` of a random step, zero where it was not steered."""
        if self.setup.student.times[step.j] > self.settings.highest_time:
            return step.transition.mean.new_zeros(())
        return guidance_distillation_loss(step.transition, rollout.guided_means[step.place])

    def steered(self, step: Transition, call: PolicyCall) -> tuple[Transition, Tensor]:
        """The guided transition and the process rewards [n] at x_t; above `highest_time` neither, and zeros.

        By default the process reward is the reward of the x0 that the policy predicts at x_t, with the velocity held,
        so no gradient passes through the policy (our reading); with a latent reward model it is the model's, as in the
        paper.
        """
        setup, settings, times, x_t = self.setup, self.settings, self.setup.student.times, call.x_t
        t, t_next = (
            torch.full((len(x_t),), times[k], dtype=x_t.dtype, device=x_t.device) for k in (call.j, call.j + 1)
        )
        if times[call.j] > settings.highest_time:
            return step, torch.zeros_like(t)
        with torch.enable_grad():
            leaf = x_t.detach().requires_grad_()
            if setup.latent_reward is not None:
                rewards = latent_judgement(setup.latent_reward, leaf, t, call.condition, gradient=True)
            else:
                pixels = setup.teacher.decode(x0_from_velocity(leaf, call.velocity.detach(), t))
                rewards = setup.reward.total(setup.reward.with_gradient(pixels, call.prompts))
            gradient = process_gradient(rewards, leaf)
        gradient = unit_gradient(gradient) if settings.unit_gradient else gradient
        return guided_transition(step, gradient, step_scale(t, t_next, guidance=settings.guidance)), rewards.detach()
