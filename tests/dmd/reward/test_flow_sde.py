"""Stochastic steps: marginals of Gaussians by exact recursion, log-probabilities against torch.distributions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fewstep.core.paths import add_noise, velocity_from_x0
from fewstep.dmd.reward.flow_sde import (
    Transition,
    cps_transition,
    distance_log_prob,
    flow_sde_diffusion,
    sde_transition,
    transition_kl,
    transition_log_prob,
)
from tests.dmd.gaussian_bench import Gaussian, hermite_grid, transition, transition_coefficient

TEACHER = Gaussian(0.7, 1.3)


def full(value: float, count: int = 1) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def affine(step: Transition) -> tuple[float, float, float]:
    """(slope, offset, std) of a step that was probed at 0 and 1."""
    offset = float(step.mean[0, 0])
    return float(step.mean[1, 0]) - offset, offset, float(step.std.flatten()[0])


PROBE = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def sde_moments(steps: int, eta: float | None = 0.3) -> tuple[float, float]:
    """Mean and variance at 0.02 after equal steps from the exact law at 0.98; None is Flow-GRPO's g."""
    mean, variance = 0.02 * float(TEACHER.mean), float(TEACHER.variance(0.98))
    times = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64)
    for now, then in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        t = full(now, 2)
        g = full(eta, 2) if eta is not None else flow_sde_diffusion(t, scale=0.7, second_time=0.95)
        step = sde_transition(PROBE, TEACHER.velocity(PROBE, now), t, full(then, 2), diffusion=g)
        slope, offset, std = affine(step)
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
    return mean, variance


def test_sde_keeps_the_mean_exactly_and_the_variance_to_first_order() -> None:
    errors = []
    for steps in (40, 160, 640, 2560):
        mean, variance = sde_moments(steps)
        assert mean == pytest.approx(0.98 * 0.7, abs=1e-12)
        errors.append(variance - TEACHER.variance(0.02))
    assert errors == pytest.approx([-0.0928, -0.0237, -0.0060, -0.0015], abs=5e-5)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.02)
    assert errors[2] / errors[3] == pytest.approx(4.0, rel=0.01)


def test_flow_grpo_diffusion_keeps_the_marginals_in_the_limit() -> None:
    coarse, fine = (sde_moments(steps, eta=None)[1] - TEACHER.variance(0.02) for steps in (400, 1600))
    assert abs(fine) < 0.01
    assert coarse / fine == pytest.approx(4.0, rel=0.1)


def test_flow_grpo_diffusion_values_and_the_end_at_one() -> None:
    values = flow_sde_diffusion(tensor(0.5, 0.8, 1.0), scale=0.7, second_time=0.9)
    assert values.tolist() == pytest.approx([0.7, 1.4, 0.7 / math.sqrt(0.1)])
    with pytest.raises(ValueError, match="0 < second_time < 1"):
        flow_sde_diffusion(tensor(0.5), second_time=1.0)


def test_zero_diffusion_and_zero_eta_are_the_euler_step() -> None:
    x = torch.linspace(-2, 2, 10, dtype=torch.float64).view(2, 5)
    t, t_next = tensor(0.8, 0.5), tensor(0.6, 0.1)
    velocity = TEACHER.velocity(x, t[:, None])
    euler = x - (t - t_next)[:, None] * velocity
    step = sde_transition(x, velocity, t, t_next, diffusion=torch.zeros_like(t))
    assert torch.equal(step.draw(torch.ones_like(x)), euler)
    step = cps_transition(x, velocity, t, t_next, eta=0.0)
    torch.testing.assert_close(step.draw(torch.ones_like(x)), euler, rtol=1e-14, atol=1e-14)
    assert float(step.std.max()) == 0.0


def test_cps_with_eta_one_is_renoising_exactly() -> None:
    x, noise = torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 4), torch.ones(1, 4, dtype=torch.float64)
    velocity = TEACHER.velocity(x, 0.7)
    step = cps_transition(x, velocity, tensor(0.7), tensor(0.3), eta=1.0)
    torch.testing.assert_close(step.draw(noise), add_noise(x - 0.7 * velocity, noise, tensor(0.3)), rtol=0, atol=1e-15)


@given(st.floats(0.05, 1.0), st.floats(0.0, 0.95), st.floats(0.0, 1.0))
def test_cps_equals_the_bench_for_all_times(t: float, fraction: float, eta: float) -> None:
    x, noise = torch.tensor([[0.3, -1.7]], dtype=torch.float64), torch.tensor([[0.9, 0.2]], dtype=torch.float64)
    velocity = TEACHER.velocity(x, t)
    drawn = cps_transition(x, velocity, full(t), full(t * fraction), eta=eta).draw(noise)
    expected = transition(x, velocity, t, t * fraction, eta=eta, noise=noise)
    torch.testing.assert_close(drawn, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])
def test_cps_with_a_posterior_mean_loses_the_stated_variance(eta: float) -> None:
    t, s = 0.8, 0.5
    slope, offset, std = affine(cps_transition(PROBE, TEACHER.velocity(PROBE, t), full(t, 2), full(s, 2), eta=eta))
    assert slope * (1 - t) * 0.7 + offset == pytest.approx((1 - s) * 0.7, abs=1e-14)
    loss = TEACHER.variance(s) - (slope**2 * TEACHER.variance(t) + std**2)
    expected = 1.69 / TEACHER.variance(t) * ((1 - s) * t - s * (1 - t) * math.cos(eta * math.pi / 2)) ** 2
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0])
def test_cps_is_exact_for_a_student_that_draws_x0(eta: float) -> None:
    t, s = 0.9, 0.6
    points, weights = hermite_grid(16, 3)
    x0, eps, noise = TEACHER.sample(points[:, :1]), points[:, 1:2], points[:, 2:]
    x_t = add_noise(x0, eps, full(t, len(x0)))
    velocity = velocity_from_x0(x_t, x0, full(t, len(x0)))
    x_s = cps_transition(x_t, velocity, full(t, len(x0)), full(s, len(x0)), eta=eta).draw(noise)[:, 0]
    mean = float((weights * x_s).sum())
    assert mean == pytest.approx((1 - s) * 0.7)
    assert float((weights * (x_s - mean) ** 2).sum()) == pytest.approx(TEACHER.variance(s))


def test_gain_of_two_velocities() -> None:
    x, noise = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    step = [cps_transition(x, v * x, tensor(0.8), tensor(0.4), eta=0.9).draw(noise) for v in (0.0, 1.0)]
    assert float(step[1] - step[0]) == pytest.approx(transition_coefficient(0.8, 0.4, eta=0.9))


def make_policy() -> tuple[Transition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return Transition(mean, tensor(0.2, 0.5, 1.1).view(3, 1, 1)), x


def test_log_prob_and_kl_equal_torch_distributions() -> None:
    policy, x = make_policy()
    normal, reference = Normal(policy.mean, policy.std.expand(3, 2, 4)), policy.mean.detach() + 0.3
    density = normal.log_prob(x.detach())
    torch.testing.assert_close(transition_log_prob(x, policy, reduction="sum"), density.sum(dim=(1, 2)))
    torch.testing.assert_close(transition_log_prob(x, policy), density.mean(dim=(1, 2)))
    kl = kl_divergence(normal, Normal(reference, policy.std.expand(3, 2, 4)))
    torch.testing.assert_close(transition_kl(policy, reference, reduction="sum"), kl.sum(dim=(1, 2)))
    assert transition_kl(policy, reference).tolist() == pytest.approx([0.045 / 0.04, 0.045 / 0.25, 0.045 / 1.21])
    assert transition_kl(policy, policy.mean).abs().max().item() == 0.0


def test_gradient_reaches_the_mean_alone() -> None:
    policy, x = make_policy()
    transition_log_prob(x, policy).sum().backward()
    assert x.grad is None
    expected = (x - policy.mean) / policy.std**2 / 8
    torch.testing.assert_close(policy.mean.grad, expected.detach())
    (by_distance,) = torch.autograd.grad(distance_log_prob(x, policy).sum(), policy.mean)
    torch.testing.assert_close(by_distance, (2 * policy.std**2 * expected).detach())


def test_distance_log_prob_of_a_deterministic_step_has_no_gradient() -> None:
    mean = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    policy = Transition(mean, torch.zeros(2, 1, dtype=torch.float64))
    x = policy.draw(torch.ones(2, 3, dtype=torch.float64))
    distance_log_prob(x, policy).sum().backward()
    assert mean.grad is not None
    assert float(mean.grad.abs().max()) == 0.0
    with pytest.raises(ValueError, match="deterministic step"):
        transition_log_prob(x, policy)
    with pytest.raises(ValueError, match="deterministic step"):
        transition_kl(policy, mean)


def test_ratio_integrates_to_one_when_summed_and_to_less_when_averaged() -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(100_000, 4, generator=generator, dtype=torch.float64)
    policy, old = Transition(torch.full_like(z, 0.2), tensor(0.5)), Transition(torch.zeros_like(z), tensor(0.5))
    x, kl = old.draw(z), 4 * 0.2**2 / (2 * 0.25)
    summed = transition_log_prob(x, policy, reduction="sum") - transition_log_prob(x, old, reduction="sum")
    averaged = transition_log_prob(x, policy) - transition_log_prob(x, old)
    assert float(summed.exp().mean()) == pytest.approx(1.0, abs=1e-2)
    assert float(averaged.exp().mean()) == pytest.approx(math.exp(-kl / 4 + kl / 16), abs=3e-3)


def test_bf16_states_keep_the_ratio_at_one() -> None:
    x, velocity = torch.randn(2, 8, generator=torch.Generator().manual_seed(2)).bfloat16(), torch.ones(2, 8)
    t, t_next = torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.2])
    policy = cps_transition(x, velocity, t, t_next, eta=0.9)
    stored = policy.draw(torch.ones(2, 8)).bfloat16()
    again = cps_transition(x, velocity, t, t_next, eta=0.9)
    assert torch.equal(transition_log_prob(stored, policy), transition_log_prob(stored, again))
    assert policy.mean.dtype == torch.float32


def test_wrong_input() -> None:
    x = torch.zeros(1, 2)
    t = torch.tensor([0.5])
    with pytest.raises(ValueError, match="t_next < t"):
        sde_transition(x, x, t, t, diffusion=t)
    with pytest.raises(ValueError, match="eta must lie"):
        cps_transition(x, x, t, t / 2, eta=1.5)
    with pytest.raises(ValueError, match="one shape"):
        cps_transition(x, torch.zeros(1, 3), t, t / 2, eta=0.5)
