"""Matching as a reward: log-density ratios from denoising errors, group statistics, and what may be centred."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.dmd.loss import direction_normaliser, distribution_matching_loss, matching_direction
from fewstep.dmd.reward.groups import group_advantages
from fewstep.dmd.reward.methods.gndm import (
    adaptive_weight,
    gndm_loss,
    gndmr_advantages,
    likelihood_weight,
    matching_reward,
)
from tests.dmd.gaussian_bench import Gaussian, hermite_grid, normaliser_limit

TEACHER, STUDENT = Gaussian(0.7, 1.3), Gaussian(-0.4, 0.6)


def full(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def reward_at(x0: float, t: float, fake: Gaussian, real: Gaussian) -> float:
    """E over eps of the matching reward of one sample."""
    eps, weights = hermite_grid(4, 1)
    x_t = add_noise(full(x0, len(eps))[:, None], eps, full(t, len(eps)))
    values = matching_reward(fake.velocity(x_t, t), real.velocity(x_t, t), eps - x0, full(t, len(eps)))
    return float((weights * values).sum())


def test_zero_where_the_scores_agree() -> None:
    assert reward_at(0.3, 0.5, TEACHER, TEACHER) == 0.0


@pytest.mark.parametrize("x0", [-1.0, 0.4, 3.0])
def test_integral_is_the_log_density_ratio(x0: float) -> None:
    nodes, mass = np.polynomial.legendre.leggauss(40)
    total = sum(m / 2 * reward_at(x0, (n + 1) / 2, STUDENT, TEACHER) for n, m in zip(nodes, mass, strict=True))
    point = torch.tensor([x0], dtype=torch.float64)
    expected = float(TEACHER.log_density(point, 0.0) - STUDENT.log_density(point, 0.0))
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_equal_variances_give_kappa_times_the_ratio(t: float) -> None:
    shifted = Gaussian(0.2, 1.3)
    kappa = 2 * 1.69 * t**2 / TEACHER.variance(t) ** 2
    point = torch.tensor([1.1], dtype=torch.float64)
    ratio = float(TEACHER.log_density(point, 0.0) - shifted.log_density(point, 0.0))
    assert reward_at(1.1, t, shifted, TEACHER) == pytest.approx((1 - t) / t * kappa * ratio)


def test_reward_has_no_graph_and_the_weight_its_range() -> None:
    velocity = torch.ones(2, 3, requires_grad=True)
    value = matching_reward(2 * velocity, velocity, torch.zeros(2, 3), torch.tensor([0.5, 0.25]), reduction="mean")
    assert not value.requires_grad
    assert value.tolist() == pytest.approx([3.0, 9.0])
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        likelihood_weight(torch.tensor([0.0]))


def sample_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = STUDENT.sample(x0).requires_grad_()
    x_t = add_noise(x0.detach(), eps, full(0.6, 6))
    return x0, STUDENT.x0(x_t, 0.6), TEACHER.x0(x_t, 0.6)


def test_groups_of_one_are_dmd_and_order_does_not_matter() -> None:
    x0, fake, real = sample_batch()
    (own,) = torch.autograd.grad(gndm_loss(x0, fake, real, torch.arange(6)), x0)
    (plain,) = torch.autograd.grad(distribution_matching_loss(x0, fake, real), x0)
    torch.testing.assert_close(own, plain)
    group, order = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([2, 0, 1, 5, 3, 4])
    (gradient,) = torch.autograd.grad(gndm_loss(x0, fake, real, group), x0)
    shuffled = gndm_loss(x0[order], fake[order], real[order], group)
    torch.testing.assert_close(torch.autograd.grad(shuffled, x0)[0], gradient)
    normaliser = direction_normaliser(x0, real)[:3].mean()
    torch.testing.assert_close(gradient[:3] * x0.numel(), ((fake - real) / normaliser)[:3].detach())


def test_group_normaliser_limit_and_variance() -> None:
    generator = torch.Generator().manual_seed(1)
    t, count = 0.6, 4000
    x0, eps = (torch.randn(count, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = TEACHER.sample(x0)
    own = direction_normaliser(x0, TEACHER.x0(add_noise(x0, eps, full(t, count)), t))
    assert float(own.mean()) == pytest.approx(normaliser_limit(TEACHER, t), rel=0.01)
    # Means over groups of eight have an eighth of the variance.
    assert float(own.view(-1, 8).mean(dim=1).var() / own.var()) == pytest.approx(1 / 8, rel=0.15)


def test_centring_the_direction_would_remove_the_mean_shift() -> None:
    # A student that differs in its mean alone: the direction is one constant, which a centred group loses.
    shifted = Gaussian(0.2, 1.3)
    x_t = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    direction = shifted.x0(x_t, 0.5) - TEACHER.x0(x_t, 0.5)
    assert float((direction - direction.mean()).abs().max()) < 1e-15
    raw = matching_direction(x_t, shifted.x0(x_t, 0.5), TEACHER.x0(x_t, 0.5))
    assert float(raw.max()) < 0


def test_policy_gradient_of_the_reward_points_to_the_teacher() -> None:
    # d E[R_dm] / d mu = -d KL = (m - mu) / S for equal stds, through the score function.
    z, weights = hermite_grid(8, 1)
    shifted = Gaussian(0.2, 1.3)
    x = shifted.sample(z[:, 0])
    rewards = TEACHER.log_density(x, 0.0) - shifted.log_density(x, 0.0)
    gradient = float((weights * rewards * z[:, 0] / 1.3).sum())
    assert gradient == pytest.approx(0.5 / 1.69)


def test_advantages_sum_to_zero_and_a_prompts_constant_drops_out() -> None:
    generator = torch.Generator().manual_seed(2)
    matching, rewards = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    joint = gndmr_advantages(matching, rewards, group, tilt_scale=0.5)
    assert [part.sum().item() for part in joint.chunk(2)] == pytest.approx([0.0, 0.0], abs=1e-12)
    # Without matching, the reward's own standard score.
    alone = gndmr_advantages(torch.zeros_like(rewards), rewards, group, tilt_scale=0.5)
    assert alone[:4].std(correction=0).item() == pytest.approx(1.0, rel=1e-3)
    moved = gndmr_advantages(matching + 5.0 * group, rewards - 3.0 * group, group, tilt_scale=0.5)
    torch.testing.assert_close(moved, joint)


def test_one_divisor_keeps_the_temperature_and_two_lose_it() -> None:
    # At the tilt lambda, R_dm = const - lambda r.
    rewards, group = torch.linspace(-1, 2, 16, dtype=torch.float64), torch.zeros(16, dtype=torch.long)
    for scale in (0.3, 2.0):
        matching = 7.0 - scale * rewards
        assert float(gndmr_advantages(matching, rewards, group, tilt_scale=scale).abs().max()) < 1e-12
        assert float(gndmr_advantages(matching, rewards, group, tilt_scale=2 * scale).max()) > 0.5
        separate = [group_advantages(part, group, scale="group").values for part in (matching, rewards)]
        assert float((separate[0] + separate[1]).abs().max()) < 1e-3


def test_adaptive_weight_matches_the_norms() -> None:
    weight = adaptive_weight(torch.full((2, 2), 3.0), torch.full((2, 2), -0.5), share=0.5)
    assert weight.item() == pytest.approx(3.0)
    # Opposed gradients leave 1 - share of the matching gradient, whatever their sizes: no balance but at zero.
    for size in (0.1, 10.0):
        matching, reward = torch.full((4,), size), torch.full((4,), -0.5)
        left = matching + adaptive_weight(matching, reward, share=0.5) * reward
        torch.testing.assert_close(left, 0.5 * matching)
    with pytest.raises(ValueError, match="share"):
        adaptive_weight(torch.ones(1), torch.ones(1), share=-1.0)


def test_non_finite_rewards_are_refused() -> None:
    group, bad = torch.zeros(2, dtype=torch.long), torch.tensor([0.0, math.inf])
    with pytest.raises(ValueError, match=r"matching rewards of samples \[1\]"):
        gndmr_advantages(bad, torch.zeros(2), group, tilt_scale=1.0)
    with pytest.raises(ValueError, match=r"rewards of samples \[1\]"):
        gndmr_advantages(torch.zeros(2), bad, group, tilt_scale=1.0)
    with pytest.raises(ValueError, match="tilt_scale"):
        gndmr_advantages(torch.zeros(2), torch.zeros(2), group, tilt_scale=0.0)
