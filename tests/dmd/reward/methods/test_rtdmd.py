"""The hybrid gradient and the effective temperature of matching with a reward, in closed form."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.dmd.loss import direction_normaliser, distribution_matching_loss
from fewstep.dmd.reward.chain import clipped_surrogate
from fewstep.dmd.reward.flow_sde import Transition, transition_log_prob
from fewstep.dmd.reward.methods.rtdmd import EffectiveTilt, direct_reward_loss, effective_tilt, hybrid_loss
from tests.dmd.gaussian_bench import Gaussian, hermite_grid


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_direct_loss_is_minus_the_reward_below_the_margin() -> None:
    rewards = tensor(1.0, 2.5, 4.0).requires_grad_()
    loss = direct_reward_loss(rewards)
    loss.backward()
    assert loss.item() == pytest.approx(2.5 / 3)
    assert rewards.grad is not None
    assert rewards.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0.0])


def test_direct_loss_refuses_what_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"samples \[0\] are not finite"):
        direct_reward_loss(tensor(math.nan, 1.0).requires_grad_())
    with pytest.raises(ValueError, match="no gradient"):
        direct_reward_loss(tensor(1.0))
    with pytest.raises(ValueError, match="must not be negative"):
        hybrid_loss(tensor(0.0), tensor(0.0), tensor(0.0), matching_weight=-1.0)


def test_hybrid_gradient_has_two_halves() -> None:
    # x_a ~ N(theta, rho^2), x0 = x_a + theta, r = c x0: c from the policy gradient, c from the last step.
    slope, rho = 1.4, 0.6
    points, weights = hermite_grid(8, 1)
    mass = weights * len(points)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    policy = Transition(theta.expand(len(points), 1), tensor(rho))
    x_a = policy.draw(points).detach()
    rewards = slope * (x_a + theta)[:, 0]
    log_prob = transition_log_prob(x_a, policy)
    advantages = mass * (rewards.detach() - (mass * rewards.detach()).mean())
    policy_loss = clipped_surrogate(log_prob - log_prob.detach(), advantages, clip_range=0.1, advantage_clip=1e3).loss
    reward_loss = direct_reward_loss(mass * rewards, margin=1e3)
    (by_policy,) = torch.autograd.grad(policy_loss, theta, retain_graph=True)
    (by_reward,) = torch.autograd.grad(reward_loss, theta, retain_graph=True)
    assert float(by_policy) == pytest.approx(-slope)
    assert float(by_reward) == pytest.approx(-slope)
    total = hybrid_loss(policy_loss, torch.zeros(()), reward_loss, matching_weight=0.0, reward_weight=1.0)
    assert float(torch.autograd.grad(total, theta)[0]) == pytest.approx(-2 * slope)


def test_without_matching_and_direct_reward_it_is_the_policy_loss() -> None:
    policy = torch.tensor(0.7)
    assert float(hybrid_loss(policy, torch.tensor(3.0), torch.tensor(5.0))) == pytest.approx(0.7 + 3e-3 + 5e-4)
    assert float(hybrid_loss(policy, torch.tensor(3.0), torch.tensor(5.0), matching_weight=0, reward_weight=0)) == (
        pytest.approx(0.7)
    )


def tilt_at(t: float, normaliser: Tensor | None = None) -> EffectiveTilt:
    """The tilt at one time for S = 2 and S' = 1."""
    one = torch.ones((), dtype=torch.float64)
    return effective_tilt(
        tensor(t),
        reward_weight=0.3,
        matching_weight=0.1,
        elements=4,
        teacher_variance=2 * one,
        student_variance=one,
        normaliser=normaliser,
    )


def test_effective_tilt_golden() -> None:
    # t = 0.5: D = 0.75, V = 0.5.
    tilt = tilt_at(0.5)
    assert float(tilt.mean) == pytest.approx(12.0 / (2.0 * 0.25 / 0.75))
    assert float(tilt.spread) == pytest.approx(12.0 / (2.0 * 0.0625 / (0.75 * 0.5)))
    assert float(tilt_at(0.5, normaliser=tensor(0.5)).mean) == pytest.approx(float(tilt.mean) / 2)
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(ValueError, match="has no anchor"):
        effective_tilt(
            tensor(0.5), reward_weight=1.0, matching_weight=0.0, elements=1, teacher_variance=one, student_variance=one
        )


def test_both_temperatures_agree_at_small_times() -> None:
    early, late = tilt_at(0.01), tilt_at(0.8)
    # S t^2 / D tends to t^2.
    assert float(early.mean) == pytest.approx(12.0 / 1e-4, rel=0.03)
    assert float(early.spread / early.mean) == pytest.approx(1.0, rel=0.03)
    assert float(late.spread / late.mean) > 10


def test_gradient_vanishes_at_the_stated_tilt() -> None:
    # The linear reward's stationary mean with the per-sample normaliser of the loss itself.
    teacher, slope, weight = Gaussian(0.7, 1.3), 0.8, 0.05
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(32, 4096, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(0.05, 0.95, 32, dtype=torch.float64)

    def gradient(mean: float) -> tuple[float, float]:
        """d loss / d mean, and the tilt's mean that belongs to the student's samples."""
        parameter = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        x0 = Gaussian(parameter, 1.3).sample(z)
        x_t = add_noise(x0.detach(), eps, t)
        fake, real = Gaussian(mean, 1.3).x0(x_t, t[:, None]), teacher.x0(x_t, t[:, None])
        loss = hybrid_loss(
            torch.zeros(()), distribution_matching_loss(x0, fake, real),
            direct_reward_loss(slope * x0.mean(dim=1), margin=1e3), matching_weight=0.5, reward_weight=weight,
        )  # fmt: skip
        loss.backward()
        # The reward is a mean over elements, the tilt of one element's slope is its share.
        variance = torch.tensor(1.69, dtype=torch.float64)
        tilt = effective_tilt(
            t, reward_weight=weight, matching_weight=0.5, elements=1, teacher_variance=variance,
            student_variance=variance, normaliser=direction_normaliser(x0, real),
        )  # fmt: skip
        assert parameter.grad is not None
        return float(parameter.grad), 0.7 + float(tilt.mean) * 1.69 * slope

    mean = 0.7
    for _ in range(20):
        mean = gradient(mean)[1]
    assert mean - 0.7 > 0.1
    start, rest = gradient(0.7)[0], gradient(mean)[0]
    assert start < -0.03
    assert abs(rest) < 1e-9
