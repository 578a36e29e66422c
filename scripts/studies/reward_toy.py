"""Each reward method on one-dimensional Gaussians, where the tilted teacher is known in closed form.

The teacher is N(m, S) with an exact denoiser, the fake score is exact, expectations are sums over quasi-random points,
all in fp64. What a run shows is the fixed point of the losses, free of networks and of sampling noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.causal_video.reward.astrolabe import selective_penalty
from fewstep.core.paths import add_noise, expand_time, x0_from_velocity
from fewstep.dmd.loss import direction_normaliser, distribution_matching_loss
from fewstep.dmd.reward.chain import clipped_surrogate
from fewstep.dmd.reward.flow_sde import Transition, sde_transition, transition_kl, transition_log_prob
from fewstep.dmd.reward.methods.crd import crd_loss, implicit_reward
from fewstep.dmd.reward.methods.euphonium import guided_transition, langevin_scale, tilted_velocity
from fewstep.dmd.reward.methods.flash import preference_loss, preference_margin
from fewstep.dmd.reward.methods.gndm import gndmr_advantages, likelihood_weight, matching_reward
from fewstep.dmd.reward.methods.nft import nft_loss, optimality_probability
from fewstep.dmd.reward.methods.redmd import rollout_weights, space_time_weight
from fewstep.dmd.reward.methods.rtdmd import direct_reward_loss, effective_tilt, hybrid_loss

Method = Literal["grpo", "rtdmd", "gndmr", "nft", "astrolabe", "crd", "flash_dmd", "euphonium", "re_dmd", "stream_r1"]
MAX_ADVANTAGE = 5.0
ROWS, FRAMES, SIDE = 32, 2, 8


@dataclass(frozen=True, eq=False)
class GaussianLaw:
    """N(mean, std^2) of each element, 0-dim tensors, with its exact denoiser."""

    mean: Tensor
    std: Tensor

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps - x0 | x_t] for x_t [B, ...], t [B]."""
        t = expand_time(t, x_t)
        variance = (1 - t).square() * self.std.square() + t.square()
        return ((t - (1 - t) * self.std.square()) * x_t - t * self.mean) / variance

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]."""
        return x0_from_velocity(x_t, self.velocity(x_t, t), t)

    def sample(self, z: Tensor) -> Tensor:
        """mean + std z."""
        return self.mean + self.std * z

    def detached(self) -> GaussianLaw:
        """The same without graph."""
        return GaussianLaw(self.mean.detach().clone(), self.std.detach().clone())


@dataclass(frozen=True)
class ToyReward:
    """r(x) = slope x - curvature x^2 / 2."""

    slope: float = 0.5
    curvature: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.slope * x - 0.5 * self.curvature * x.square()

    def gradient(self, x: Tensor) -> Tensor:
        """dr / dx."""
        return self.slope - self.curvature * x

    def tilt(self, law: GaussianLaw, scale: float | Tensor) -> GaussianLaw:
        """law e^{scale r}, normalised.

        Raises:
            ValueError: the tilt has no finite integral (curvature below -1 / (scale S)).
        """
        precision = law.std.square().reciprocal() + scale * self.curvature
        if float(precision) <= 0:
            raise ValueError(f"the tilt by {float(scale)} with curvature {self.curvature} cannot be normalised")
        mean = (law.mean / law.std.square() + scale * self.slope) / precision
        return GaussianLaw(mean, precision.rsqrt())


LINEAR = ToyReward()


@dataclass(frozen=True)
class ToyResult:
    """Where a method came to rest, and where its docstring says it does.

    `tilt_scale` is lambda of the teacher e^{lambda r} that the mean obeys, 0 for methods that do not tilt.
    """

    method: str
    mean: float
    std: float
    target_mean: float
    target_std: float
    tilt_scale: float


class ToyStudent(nn.Module):
    """The generator z -> mean + std z."""

    def __init__(self, law: GaussianLaw) -> None:
        super().__init__()
        self.mean = nn.Parameter(law.mean.detach().clone())
        self.log_std = nn.Parameter(law.std.detach().log())

    def law(self) -> GaussianLaw:
        """The student's law, with graph."""
        return GaussianLaw(self.mean, self.log_std.exp())


def run_reward_toy(
    method: Method,
    *,
    reward: ToyReward = LINEAR,
    teacher: tuple[float, float] = (0.4, 1.2),
    tilt_scale: float = 0.8,
    updates: int = 200,
) -> ToyResult:
    """Train the method on N(mean, std^2) = `teacher` and compare with its closed form.

    grpo and flash_dmd move the mean of a transition of fixed std. nft, astrolabe and flash_dmd state a tilt for linear
    rewards: a curved one is tilted to first order by the first two, and not by flash_dmd. euphonium is not trained, its
    guided sampler is followed exactly.

    Args:
        method: see `Method`.
        reward: of one element.
        teacher: mean and std.
        tilt_scale: strength that the method is set to; rtdmd reaches the tilt that `effective_tilt` computes from
            its weights instead.
        updates: of the optimizer.

    Raises:
        ValueError: the method is unknown.
    """
    law = GaussianLaw(*(torch.tensor(value, dtype=torch.float64) for value in teacher))
    if method == "rtdmd":
        return _rtdmd(law, reward, tilt_scale, updates)
    if method in ("re_dmd", "stream_r1"):
        return _weighted(law, reward, tilt_scale, updates, elements=method == "stream_r1")
    target = reward.tilt(law, tilt_scale)
    if method == "euphonium":
        return _result(method, follow_guided_sampler(law, reward, tilt_scale), target, tilt_scale)
    student = ToyStudent(law)
    if method == "grpo":
        _fit(student, lambda: _grpo_loss(student, law, reward, tilt_scale), updates)
    elif method == "gndmr":
        _fit(student, lambda: _gndmr_loss(student, law, reward, tilt_scale), updates)
    elif method == "nft":
        _fit(student, lambda: _nft_loss(student, law, reward, nft_beta=1 / (MAX_ADVANTAGE * tilt_scale)), updates)
    elif method == "astrolabe":
        _fit(student, lambda: _astrolabe_loss(student, law, reward, tilt_scale), updates)
    elif method == "crd":
        _fit(student, lambda: _crd_loss(student, law, reward, tilt_scale), updates)
    elif method == "flash_dmd":
        _fit(student, lambda: _flash_loss(student, law, reward, tilt_scale), updates)
    else:
        raise ValueError(f"reward method {method!r} is unknown; choose one of {', '.join(Method.__args__)}")
    if method in ("grpo", "flash_dmd"):
        target = GaussianLaw(target.mean, law.std)
    return _result(method, student.law(), target, tilt_scale)


def _result(method: str, law: GaussianLaw, target: GaussianLaw, tilt_scale: float) -> ToyResult:
    return ToyResult(
        method,
        mean=law.mean.item(),
        std=law.std.item(),
        target_mean=target.mean.item(),
        target_std=target.std.item(),
        tilt_scale=tilt_scale,
    )


def _fit(student: ToyStudent, loss: Callable[[], Tensor], updates: int, *, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, betas=(0.8, 0.95))
    # Down to a thousandth: the end is a point, not a cloud.
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-3 ** (1 / updates))
    for _ in range(updates):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


def normal_points(count: int, dimensions: int) -> Tensor:
    """Quasi-random standard normal points [count, dimensions], fp64; balanced for count a power of two."""
    points = torch.quasirandom.SobolEngine(dimensions).draw(count, dtype=torch.float64)
    return torch.special.ndtri(points + 0.5 / count)


def uniform_times(count: int) -> Tensor:
    """Midpoints of [0.02, 0.98], [count], fp64."""
    return 0.02 + 0.96 * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def _likelihood_nodes() -> tuple[Tensor, Tensor, Tensor]:
    """(t, eps, weight) [48] for E over t in (0, 1) and eps: Legendre times three Hermite nodes, exact in eps."""
    t, dt = (torch.from_numpy(array) for array in np.polynomial.legendre.leggauss(16))
    eps, mass = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(3))
    weight = (dt / 2)[:, None] * (mass / mass.sum())
    return ((t + 1) / 2).repeat_interleave(3), eps.repeat(16), weight.flatten()


def _policy(law: GaussianLaw, count: int) -> Transition:
    """The law as a transition of `count` samples [count, 1]."""
    return Transition(law.mean.expand(count, 1), law.std.expand(count, 1))


def _grpo_loss(student: ToyStudent, law: GaussianLaw, reward: ToyReward, tilt_scale: float) -> Tensor:
    """Policy gradient with a KL to the teacher of weight 1 / tilt_scale, for the mean of one transition."""
    z = normal_points(1024, 1)
    policy = _policy(GaussianLaw(student.mean, law.std), len(z))
    x = policy.draw(z).detach()
    rewards = reward(x[:, 0])
    log_prob = transition_log_prob(x, policy)
    surrogate = clipped_surrogate(
        log_prob - log_prob.detach(), rewards - rewards.mean(), clip_range=0.2, advantage_clip=1e3
    )
    return surrogate.loss + transition_kl(policy, law.mean.expand_as(x)).mean() / tilt_scale


def _gndmr_loss(student: ToyStudent, law: GaussianLaw, reward: ToyReward, tilt_scale: float) -> Tensor:
    """Policy gradient of log p_real - log p_fake + tilt_scale r; mean and std of the policy both move."""
    z = normal_points(128, 1)
    policy = _policy(student.law(), len(z))
    x = policy.draw(z).detach()
    matching = _average_over_nodes(
        x, lambda x_t, t, v: matching_reward(student.law().detached().velocity(x_t, t), law.velocity(x_t, t), v, t)
    )
    group = torch.zeros(len(z), dtype=torch.long)
    advantages = gndmr_advantages(matching, reward(x[:, 0]), group, tilt_scale=tilt_scale)
    log_prob = transition_log_prob(x, policy)
    return clipped_surrogate(log_prob - log_prob.detach(), advantages, clip_range=0.2).loss


def _average_over_nodes(x0: Tensor, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over shared (t, eps) of value(x_t, t, velocity target) [B] for samples x0 [B, 1]."""
    t, eps, weight = _likelihood_nodes()
    times, noise = t.repeat_interleave(len(x0)), eps.repeat_interleave(len(x0))[:, None]
    clean = x0.repeat(len(t), 1)
    values = value(add_noise(clean, noise, times), times, noise - clean)
    return weight @ values.view(len(t), len(x0))


def _forward_batch(law: GaussianLaw) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, eps, t) of 2048 samples of the law, x0 [B, 1]."""
    points = normal_points(2048, 3)
    t = 0.02 + 0.96 * torch.special.ndtr(points[:, 2])
    return law.sample(points[:, :1]).detach(), points[:, 1:2], t


def _probabilities(x0: Tensor, reward: ToyReward) -> Tensor:
    rewards = reward(x0[:, 0])
    return optimality_probability(rewards - rewards.mean(), max_advantage=MAX_ADVANTAGE)


def _nft_loss(student: ToyStudent, law: GaussianLaw, reward: ToyReward, *, nft_beta: float) -> Tensor:
    """One epoch from the teacher, which is the old policy: 2 r - 1 = advantage / 5, so the tilt is 1 / (5 beta)."""
    x0, eps, t = _forward_batch(law)
    x_t = add_noise(x0, eps, t)
    return nft_loss(
        student.law().velocity(x_t, t), law.velocity(x_t, t), eps - x0, _probabilities(x0, reward), nft_beta=nft_beta
    )


def _astrolabe_loss(student: ToyStudent, law: GaussianLaw, reward: ToyReward, tilt_scale: float) -> Tensor:
    """Many epochs on x0 predictions with a penalty on all samples of weight 1 / (5 tilt_scale), at beta 1."""
    old = student.law().detached()
    x0, eps, t = _forward_batch(old)
    x_t = add_noise(x0, eps, t)
    prediction = student.law().x0(x_t, t)
    loss = nft_loss(prediction, old.x0(x_t, t), x0, _probabilities(x0, reward), nft_beta=1.0)
    penalty = selective_penalty(prediction, law.x0(x_t, t), torch.ones(len(x0), dtype=torch.bool))
    return loss + penalty / (MAX_ADVANTAGE * tilt_scale)


def _crd_loss(student: ToyStudent, law: GaussianLaw, reward: ToyReward, tilt_scale: float) -> Tensor:
    """The teacher is the sampler and the reference; r = 1/2 + advantage / 10, so the tilt is 1 / (10 beta)."""
    x0 = law.sample(normal_points(128, 1))
    implicit = _average_over_nodes(
        x0,
        lambda x_t, t, v: implicit_reward(
            student.law().velocity(x_t, t), law.velocity(x_t, t), v, weight=likelihood_weight(t), reduction="sum"
        ),
    )
    group = torch.zeros(len(x0), dtype=torch.long)
    return crd_loss(implicit, _probabilities(x0, reward), group, crd_beta=1 / (2 * MAX_ADVANTAGE * tilt_scale))


def _flash_loss(student: ToyStudent, law: GaussianLaw, reward: ToyReward, tilt_scale: float) -> Tensor:
    """Pairs of the teacher's transition; each order of a pair counts with its probability of winning."""
    first, second = law.sample(normal_points(1024, 2)).split(1, dim=1)
    policy = _policy(GaussianLaw(student.mean, law.std), len(first))
    margin = preference_margin(first, second, policy, law.mean.expand_as(first))
    wins = torch.sigmoid(reward(first) - reward(second))[:, 0]
    # Both orders of a pair: the mean is over pairs, so the two losses add up.
    forward = preference_loss(margin, dpo_beta=1 / tilt_scale, weight=wins)
    return forward + preference_loss(-margin, dpo_beta=1 / tilt_scale, weight=1 - wins)


def _rtdmd(law: GaussianLaw, reward: ToyReward, tilt_scale: float, updates: int) -> ToyResult:
    """Matching and the reward's own gradient on one deterministic step, with the normaliser of the matching loss."""
    student = ToyStudent(law)
    elements = FRAMES * SIDE * SIDE
    points = normal_points(ROWS * elements, 2).view(ROWS, elements, 2)
    z, eps, t = points[..., 0], points[..., 1], uniform_times(ROWS)
    reward_weight = tilt_scale / elements

    def loss() -> Tensor:
        x0, fake = student.law().sample(z), student.law().detached()
        x_t = add_noise(x0.detach(), eps, t)
        matching = distribution_matching_loss(x0, fake.x0(x_t, t), law.x0(x_t, t))
        # The hinge must never bind, or the reward has no gradient.
        direct = direct_reward_loss(reward(x0).sum(dim=1), margin=1e6)
        return hybrid_loss(torch.zeros(()), matching, direct, matching_weight=1.0, reward_weight=reward_weight)

    _fit(student, loss, updates)
    reached = student.law().detached()
    x0 = reached.sample(z)
    tilt = effective_tilt(
        t,
        reward_weight=reward_weight,
        matching_weight=1.0,
        elements=elements,
        teacher_variance=law.std.square(),
        student_variance=reached.std.square(),
        normaliser=direction_normaliser(x0, law.x0(add_noise(x0, eps, t), t)),
    )
    target = GaussianLaw(reward.tilt(law, tilt.mean).mean, reward.tilt(law, tilt.spread).std)
    return _result("rtdmd", reached, target, float(tilt.mean))


def _weighted(law: GaussianLaw, reward: ToyReward, tilt_scale: float, updates: int, *, elements: bool) -> ToyResult:
    """Reward weights on the matching gradient, from a student away from the teacher: it returns to the teacher."""
    student = ToyStudent(GaussianLaw(law.mean - 0.5, 0.7 * law.std))
    points = normal_points(ROWS * FRAMES * SIDE * SIDE, 2).view(ROWS, 1, FRAMES, SIDE, SIDE, 2)
    z, eps, t = points[..., 0], points[..., 1], uniform_times(ROWS)

    def loss() -> Tensor:
        x0, fake = student.law().sample(z), student.law().detached()
        x_t = add_noise(x0.detach(), eps, t)
        clips = x0.detach()[:, 0]
        rewards = reward(clips).mean(dim=(1, 2, 3))
        place = None
        if elements:
            saliency = torch.stack([reward.gradient(clips).abs(), clips.abs()], dim=1)
            place = space_time_weight(saliency, torch.stack([rewards, -clips.square().mean(dim=(1, 2, 3))], dim=1))
        weight = rollout_weights(rewards, tilt_scale=tilt_scale).weight
        return distribution_matching_loss(x0, fake.x0(x_t, t), law.x0(x_t, t), weight=weight, elements=place)

    _fit(student, loss, updates)
    return _result("stream_r1" if elements else "re_dmd", student.law(), law, 0.0)


def follow_guided_sampler(
    law: GaussianLaw, reward: ToyReward, tilt_scale: float, *, steps: int = 400, corrector_only: bool = False
) -> GaussianLaw:
    """Law at t = 0 of the SDE with the tilted velocity, or with the released corrector alone.

    All steps are affine in x_t, so two points give each step and mean and variance follow exactly.
    """
    mean, variance = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    times = torch.linspace(0.999, 0.0, steps + 1, dtype=torch.float64)
    probe, diffusion = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)
    for now, then in pairwise(times):
        t, t_next = now.expand(2), then.expand(2)
        gradient = _process_gradient(law, reward, probe, t, tilt_scale) / tilt_scale
        if corrector_only:
            step = sde_transition(probe, law.velocity(probe, t), t, t_next, diffusion=diffusion)
            step = guided_transition(step, gradient, langevin_scale(t, t_next, diffusion, tilt_scale=tilt_scale))
        else:
            velocity = tilted_velocity(law.velocity(probe, t), gradient, t, tilt_scale=tilt_scale)
            step = sde_transition(probe, velocity, t, t_next, diffusion=diffusion)
        slope, offset = (step.mean[1] - step.mean[0])[0], step.mean[0, 0]
        mean, variance = slope * mean + offset, slope.square() * variance + step.std[0, 0].square()
    return GaussianLaw(mean, variance.sqrt())


def _process_gradient(law: GaussianLaw, reward: ToyReward, x_t: Tensor, t: Tensor, tilt_scale: float) -> Tensor:
    """d/dx_t of log E[e^{tilt_scale r(x0)} | x_t], in closed form."""
    now, variance = expand_time(t, x_t), law.std.square()
    marginal = (1 - now).square() * variance + now.square()
    posterior_variance, gain = variance * now.square() / marginal, (1 - now) * variance / marginal
    slope = reward.gradient(law.x0(x_t, t))
    return gain * tilt_scale * slope / (1 + tilt_scale * reward.curvature * posterior_variance)
