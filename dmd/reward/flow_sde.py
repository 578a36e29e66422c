"""Stochastic steps of a flow model, whose Gaussian transitions have log-probabilities.

A step goes from t to t_next < t, step = t - t_next. Legend: B batch; x_t, x_next, velocity, noise, mean [B, ...];
t, t_next [B] (or [B, F] beside a video [B, C, F, H, W]). Arithmetic in fp32, fp64 where an input is fp64. States that
are stored in a narrower dtype must be rounded to it before their log-probability is taken, or the ratio of an
unchanged policy is not 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32, eps_from_velocity, expand_time, x0_from_velocity
from fewstep.core.shapes import require_same_shape
from fewstep.dmd.reward.inputs import Reduction, over_elements


@dataclass(frozen=True, eq=False)
class Transition:
    """x_next ~ N(mean, std^2), independent in each element.

    Attributes:
        mean: [B, ...], with the policy's graph.
        std: broadcasts over mean ([B, 1, ...]); 0 is a deterministic step, which has no log-probability.
    """

    mean: Tensor
    std: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """mean + std noise, for standard normal noise [B, ...]."""
        return self.mean + self.std * noise


def flow_sde_diffusion(t: Tensor, *, scale: float = 0.7, second_time: float) -> Tensor:
    """g = scale sqrt(t / (1 - t)), the diffusion coefficient of Flow-GRPO (arXiv:2505.05470), shape of t.

    At t = 1 the t inside 1 - t becomes `second_time`, the grid's second entry, as in the released code; our reading,
    since the paper leaves that point open.

    Raises:
        ValueError: scale is negative, or second_time is not inside (0, 1).
    """
    if scale < 0 or not 0 < second_time < 1:
        raise ValueError(f"need scale >= 0 and 0 < second_time < 1, got {scale} and {second_time}")
    t = at_least_fp32(t)
    inner = torch.where(t >= 1, torch.full_like(t, second_time), t)
    return scale * (t / (1 - inner)).sqrt()


def sde_transition(x_t: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, *, diffusion: Tensor) -> Transition:
    """Euler-Maruyama step of the SDE that has the marginals of the flow for every diffusion g >= 0.

    mean = x - step (v + g^2 / (2 t) (x + (1 - t) v)), std = g sqrt(step) (Flow-GRPO, arXiv:2505.05470; a
    constant g is DanceGRPO's, arXiv:2505.07818). g = 0 is an Euler step of the ODE, exactly. The mean of a Gaussian
    keeps its exact value, the variance converges with first order in the step.

    Args:
        x_t: [B, ...].
        velocity: [B, ...], with graph.
        t: [B] in (0, 1].
        t_next: [B], below t.
        diffusion: [B], g at t.

    Raises:
        ValueError: the shapes differ, or a time does not fall.
    """
    require_same_shape(x_t=x_t, velocity=velocity)
    _require_falling(t, t_next)
    g, now = expand_time(diffusion, x_t), expand_time(t, x_t)
    step = now - expand_time(t_next, x_t)
    x_t, velocity = at_least_fp32(x_t), at_least_fp32(velocity)
    noise_direction = eps_from_velocity(x_t, velocity, t)
    drift = velocity + g.square() / (2 * now) * noise_direction
    return Transition(x_t - step * drift, g * step.sqrt())


def cps_transition(x_t: Tensor, velocity: Tensor, t: Tensor, t_next: Tensor, *, eta: float) -> Transition:
    """Coefficient-preserving step: mean (1 - t') x0 + t' cos(eta pi / 2) eps, std t' sin(eta pi / 2), t' = t_next.

    x0 and eps are read off the velocity, so the coefficients of signal and noise are those of t' (CPS,
    arXiv:2509.05952; RTDMD, arXiv:2605.26108, uses eta 0.9). eta 0 is an Euler step of the ODE, eta 1 re-noises x0.
    It is exact where x0 is a draw from p(x0 | x_t), as a few-step student's; with a posterior mean it loses variance
    that does not vanish with the step, so it is no sampler for a many-step teacher.

    Raises:
        ValueError: the shapes differ, a time does not fall, or eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}; 0 is the ODE, 1 re-noises")
    require_same_shape(x_t=x_t, velocity=velocity)
    _require_falling(t, t_next)
    x_t, velocity, then = at_least_fp32(x_t), at_least_fp32(velocity), expand_time(t_next, x_t)
    # cos(pi / 2) is 6e-17 in fp64, which would let the old noise into a step that re-noises.
    cosine, sine = (0.0, 1.0) if eta == 1 else (math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2))
    x0, eps = x0_from_velocity(x_t, velocity, t), eps_from_velocity(x_t, velocity, t)
    return Transition((1 - then) * x0 + then * cosine * eps, then * sine)


def transition_log_prob(x_next: Tensor, transition: Transition, *, reduction: Reduction = "mean") -> Tensor:
    """log N(x_next; mean, std^2), [B]; x_next is a stored sample and gets no gradient.

    "mean" averages over the elements as the released Flow-GRPO does, "sum" is the log-density. Clip ranges belong to
    one of them: with d elements the sum's ratio needs a range about d times as wide.

    Raises:
        ValueError: the shapes differ, or the step is deterministic (std 0).
    """
    require_same_shape(x_next=x_next, mean=transition.mean)
    if not bool((transition.std > 0).all()):
        raise ValueError(
            "a deterministic step (std 0) has no log-probability: leave it out of the policy loss, and train it by the "
            "gradient of the reward itself"
        )
    z = (at_least_fp32(x_next.detach()) - transition.mean) / transition.std
    constant = transition.std.log() + 0.5 * math.log(2 * math.pi)
    return over_elements(-0.5 * z.square() - constant, reduction)


def distance_log_prob(x_next: Tensor, transition: Transition) -> Tensor:
    """-mean |x_next - mean|^2, [B]: what RTDMD's code takes for a log-probability (arXiv:2605.26108).

    Its gradient is that of the mean log-probability times 2 std^2, so steps with much noise weigh more, and the
    implicit weight of the reward differs from step to step. Zero gradient where a deterministic step is scored on its
    own sample.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x_next=x_next, mean=transition.mean)
    return over_elements(-(at_least_fp32(x_next.detach()) - transition.mean).square(), "mean")


def transition_kl(transition: Transition, reference_mean: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """KL(N(mean, std^2) || N(reference_mean, std^2)) = |mean - reference_mean|^2 / (2 std^2), [B].

    std^2 = g^2 step for an SDE step. The released Flow-GRPO divides by 2 g^2 instead, which makes its weight depend on
    the number of steps; this is the KL itself. No gradient reaches the reference.

    Raises:
        ValueError: the shapes differ, or the step is deterministic.
    """
    require_same_shape(mean=transition.mean, reference_mean=reference_mean)
    if not bool((transition.std > 0).all()):
        raise ValueError("the KL of a deterministic step (std 0) is infinite; leave that step out")
    difference = transition.mean - at_least_fp32(reference_mean.detach())
    return over_elements((difference / transition.std).square() / 2, reduction)


def _require_falling(t: Tensor, t_next: Tensor) -> None:
    if t.shape != t_next.shape or not bool((t_next < t).all()) or not bool((t_next >= 0).all()):
        raise ValueError(
            f"a step needs 0 <= t_next < t of one shape, got t {tuple(t.shape)} and t_next {tuple(t_next.shape)}, "
            f"largest t_next {float(t_next.max())}, smallest t {float(t.min())}"
        )
