"""Ambient-consistent distribution matching: the scores are compared above the noise level at which a step ended.

The first stage of RTDMD (arXiv:2605.26108), written after its released code; the body of the paper was not at hand. A
student's step ends at x_s, s < 1, with x_s ~ (1 - s) x0 + s eps. Noise is added from there to t in (s, 1): x_t =
scale x_s + level n, scale = (1 - t) / (1 - s), level^2 = t^2 - scale^2 s^2. Legend: B batch; x_s, x_t, noise,
velocities [B, ...]; s, t [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.paths import add_noise, at_least_fp32, expand_time
from fewstep.core.shapes import require_same_shape
from fewstep.dmd.loss import distribution_matching_loss
from fewstep.dmd.reward.flow_sde import cps_transition
from fewstep.dmd.reward.inputs import over_elements


def subinterval_coefficients(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, level) [B] of x_t = scale x_s + level n.

    Raises:
        ValueError: not 0 <= s < t < 1 everywhere.
    """
    s, t = at_least_fp32(s), at_least_fp32(t)
    if s.shape != t.shape or not bool(((s >= 0) & (s < t) & (t < 1)).all()):
        raise ValueError(f"need 0 <= s < t < 1 for each sample, got s {s.tolist()} and t {t.tolist()}")
    scale = (1 - t) / (1 - s)
    # (t - scale s) (t + scale s), and t - scale s = (t - s) / (1 - s): no difference of near squares.
    return scale, ((t - s) / (1 - s) * (t + scale * s)).sqrt()


def sample_subinterval_times(
    u: Tensor, s: Tensor, *, offset: float = 0.01, t_min: float = 0.02, t_max: float = 0.98
) -> Tensor:
    """Uniform times in [s + offset, 1], clamped to [t_min, t_max], [B]; at least s + offset / 2 where that is higher.

    The released code clamps alone, which puts t below s for s near 1: ours keeps t above s.

    Raises:
        ValueError: s + offset / 2 reaches 1, or the offset is not positive.
    """
    u, s = at_least_fp32(u), at_least_fp32(s)
    if offset <= 0 or not bool((s + offset / 2 < 1).all()):
        raise ValueError(f"need offset > 0 and s + offset / 2 < 1, got offset {offset}, largest s {float(s.max())}")
    lowest = s + offset
    return torch.maximum((lowest + u * (1 - lowest)).clamp(t_min, t_max), s + offset / 2)


def add_subinterval_noise(x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x_t = scale x_s + level n; `add_noise` for s = 0.

    Raises:
        ValueError: the shapes differ, or not 0 <= s < t < 1.
    """
    require_same_shape(x_s=x_s, noise=noise)
    scale, level = subinterval_coefficients(s, t)
    return expand_time(scale, x_s) * x_s + expand_time(level, x_s) * noise


def ambient_target(x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """-x_s / (1 - s) + (t + (1 - t) s^2 / (1 - s)^2) / level n: its mean given x_t is the velocity of the law.

    It is d scale/dt x_s + d level/dt n; n - x_s for s = 0. Only noisy states are needed, never the clean sample.

    Raises:
        ValueError: the shapes differ, or not 0 <= s < t < 1.
    """
    require_same_shape(x_s=x_s, noise=noise)
    _, level = subinterval_coefficients(s, t)
    s, t, level = expand_time(s, x_s), expand_time(t, x_s), expand_time(level, x_s)
    x_s = at_least_fp32(x_s.detach())
    return -x_s / (1 - s) + (t + (1 - t) * (s / (1 - s)).square()) / level * noise


def ambient_fake_score_loss(
    velocity: Tensor, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor, *, max_weight: float = 10.0
) -> Tensor:
    """mean min(level^-2, max_weight) (level velocity - level target)^2, at s = 0 and large t flow matching.

    The target grows like 1 / level as t falls to s; the product does not. The weight amounts to min(1, max_weight
    level^2) on the velocity's error, and any positive weight has the same minimiser.

    Raises:
        ValueError: the shapes differ, or not 0 <= s < t < 1.
    """
    require_same_shape(velocity=velocity, x_s=x_s, noise=noise)
    _, level = subinterval_coefficients(s, t)
    target = ambient_target(x_s, noise, s, t)
    weight = level.square().reciprocal().clamp(max=max_weight)
    scaled = expand_time(level, x_s) * (at_least_fp32(velocity) - target)
    return (weight * over_elements(scaled.square(), "mean")).mean()


def subinterval_matching_loss(
    x_s: Tensor,
    x_t: Tensor,
    fake_velocity: Tensor,
    real_velocity: Tensor,
    times: tuple[Tensor, Tensor],
    *,
    eta: float,
    noise: Tensor,
) -> Tensor:
    """Distribution matching between the states at s that the two velocities lead to from x_t.

    Both are moved from t to s by the same coefficient-preserving step with the same noise, so they differ by
    (s cos (1 - t) - (1 - s) t) (fake - real velocity), a negative factor: the direction of DMD, rescaled. The gradient
    reaches x_s alone; s = 0 is `distribution_matching_loss` on x0.

    Args:
        x_s: [B, ...] end of the student's step, with graph.
        x_t: [B, ...] the same with `add_subinterval_noise`, without graph.
        fake_velocity: [B, ...] of the fake score at x_t, without guidance.
        real_velocity: [B, ...] of the teacher at x_t, guided.
        times: (s, t).
        eta: of the sampler; RTDMD 0.9.
        noise: [B, ...] of the step back, fresh, shared by both.

    Raises:
        ValueError: the shapes differ, the times do not rise from s to t, or eta is outside [0, 1].
    """
    s, t = times
    with torch.no_grad():
        fake_s = cps_transition(x_t, fake_velocity, t, s, eta=eta).draw(noise)
        real_s = cps_transition(x_t, real_velocity, t, s, eta=eta).draw(noise)
    return distribution_matching_loss(x_s, fake_s, real_s)


def consistency_regulariser(anchor_x0: Tensor, first_x0: Tensor, second_x0: Tensor) -> Tensor:
    """mean (first - anchor) (second - anchor): unbiased for |E[first | x_t] - anchor|^2, and possibly negative.

    The fake score's predictions at x_t (anchor) and at two independent coefficient-preserving moves from it; gradients
    reach all three predictions, not the moves, which the caller makes without graph. RTDMD weighs it 0.01.

    The premise, that predictions of an exact score are a martingale, holds only for moves with
    cos = (1 - t) t' / ((1 - t') t); with a fixed eta an exact fake score leaves a residual. Pass moves made with that
    cosine (`martingale_noise`) to be free of it; RTDMD's code does not.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(anchor_x0=anchor_x0, first_x0=first_x0, second_x0=second_x0)
    anchor = at_least_fp32(anchor_x0)
    return ((at_least_fp32(first_x0) - anchor) * (at_least_fp32(second_x0) - anchor)).mean()


def martingale_noise(eps: Tensor, noise: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """cos eps + sin n with cos = (1 - t) t' / ((1 - t') t): the noise of a move that is the true reverse kernel's mean.

    Use as add_noise(x0, martingale_noise, t'). Our addition.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(eps=eps, noise=noise)
    cosine = expand_time((1 - at_least_fp32(t)) * t_next / ((1 - at_least_fp32(t_next)) * t), eps)
    return cosine * eps + (1 - cosine.square()).sqrt() * noise


def reverse_move(x0: Tensor, eps: Tensor, noise: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """The state at t' for predictions x0 and eps at t, by `martingale_noise`; without graph."""
    with torch.no_grad():
        return add_noise(x0, martingale_noise(eps, noise, t, t_next), t_next)
