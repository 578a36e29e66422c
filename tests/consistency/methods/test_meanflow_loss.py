"""MeanFlow, improved and decoupled: targets, fixed points of guidance, weights, and expectations at the optimum."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies.toy_mixture import Mixture
from torch import Tensor

from fewstep.consistency.methods.dmf import cauchy_loss
from fewstep.consistency.methods.flow_map import effective_guidance, folded_velocity
from fewstep.consistency.methods.imf import improved_guided_velocity, improved_prediction
from fewstep.consistency.methods.meanflow import adaptive_weight, meanflow_loss, meanflow_target
from fewstep.consistency.methods.scm import flow_tangent
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.core.paths import add_noise
from tests.consistency.analytic import BIMODAL, Gaussian, fp64

GAUSSIAN = Gaussian()
X, T, R = fp64(0.4, -0.9, 1.7, 0.3), fp64(0.73, 0.5, 1.0, 0.6), fp64(0.21, 0.0, 0.6, 0.6)


def along(function: object, x: Tensor, t: Tensor, r: Tensor, velocity: Tensor) -> Tensor:
    """du/dt at fixed r."""
    tangents = (torch.ones_like(t), torch.zeros_like(r))
    return total_derivative(function, x, (t, r), velocity, tangents).derivative  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [GAUSSIAN, BIMODAL], ids=["gaussian", "mixture"])
def test_exact_average_velocity_is_its_own_target(teacher: Gaussian | Mixture) -> None:
    velocity = teacher.velocity(X, T)
    target = meanflow_target(velocity, along(teacher.average_velocity, X, T, R, velocity), T, R)
    torch.testing.assert_close(target, teacher.average_velocity(X, T, R), rtol=0, atol=1e-7)
    # r = t: flow matching, whatever the derivative is.
    equal = meanflow_target(velocity, torch.full_like(X, 1e6), T, T)
    assert torch.equal(equal, velocity)


def test_forward_mode_equals_differences() -> None:
    velocity, zero = GAUSSIAN.velocity(X, T), torch.zeros_like(R)
    exact = along(GAUSSIAN.average_velocity, X, T, R, velocity)
    inside = T < 0.99
    h = 1e-4
    found = central_derivative(
        GAUSSIAN.average_velocity, X, (T, R), velocity, (torch.ones_like(T), zero), step=h, interval=(0.0, 1.0)
    )
    torch.testing.assert_close(found[inside], exact[inside], rtol=0, atol=1e-7)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_at_r_zero_the_residual_is_the_consistency_tangent() -> None:
    def student(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return torch.sin(1.3 * x) * t + 0.4 * x - 0.2 * t.square() + r

    zero, velocity = torch.zeros_like(T), GAUSSIAN.velocity(X, T)
    derivative = along(student, X, T, zero, velocity)
    value = student(X, T, zero)
    residual = meanflow_target(velocity, derivative, T, zero) - value
    torch.testing.assert_close(residual, flow_tangent(value, velocity, derivative, T).total, rtol=0, atol=1e-13)


def test_expected_target_at_the_optimum_is_the_optimum() -> None:
    # The target is linear in the velocity of the sample, so E[target | x_t] = u*: no bias without a weight.
    t, r, x = 0.6, 0.2, 0.5
    n = 400_000
    variance = (1 - t) ** 2 * 1.6**2 + t**2
    mean = float(GAUSSIAN.x0(fp64(x), t))
    std = 1.6 * t / math.sqrt(variance)
    x0 = mean + std * torch.randn(n, dtype=torch.float64)
    eps = (x - (1 - t) * x0) / t
    state, times, ends = torch.full_like(x0, x), torch.full_like(x0, t), torch.full_like(x0, r)
    velocity = eps - x0
    target = meanflow_target(velocity, along(GAUSSIAN.average_velocity, state, times, ends, velocity), times, ends)
    exact = GAUSSIAN.average_velocity(fp64(x), t, r).item()
    assert target.std().item() > 0.5
    assert target.mean().item() == pytest.approx(exact, abs=4 * target.std().item() / math.sqrt(n))


def test_loss_and_weight() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    error = (prediction - target).square().sum(dim=1).detach()
    gradients = {}
    for power in (0.0, 0.75, 1.0):
        result = meanflow_loss(prediction, target, power=power, constant=1e-3)
        weight = (error + 1e-3) ** -power
        assert result.loss.item() == pytest.approx((weight * error).mean().item(), rel=1e-12)
        by_prediction, by_target = torch.autograd.grad(result.loss, (prediction, target), allow_unused=True)
        assert by_target is None
        expected = 2 / 3 * weight.view(3, 1) * (prediction - target).detach()
        torch.testing.assert_close(by_prediction, expected, rtol=1e-12, atol=0)
        gradients[power] = by_prediction
    # A detached weight turns no sample's gradient.
    cosine = torch.cosine_similarity(gradients[0.0], gradients[1.0], dim=1)
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not adaptive_weight(prediction.sum(dim=1).square()).requires_grad


def test_broken_samples_are_isolated() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    target[0, 0] = math.nan
    leaf = prediction.requires_grad_()
    for result in (meanflow_loss(leaf, target), cauchy_loss(leaf, target, constant=0.5)):
        assert result.isolated.tolist() == [True, False, False]
        gradient = torch.autograd.grad(result.loss, leaf)[0]
        assert gradient[0].abs().max().item() == 0.0
        assert gradient[1:].abs().min().item() > 0.0


@given(omega=st.floats(0.1, 2), kappa=st.floats(0, 0.95))
def test_folded_guidance_has_its_fixed_point_at_the_effective_scale(omega: float, kappa: float) -> None:
    x, t = fp64(0.4, -0.9), fp64(0.6, 0.3)
    conditional, unconditional = Gaussian(1.5, 0.8).velocity(x, t), Gaussian(-0.4, 0.8).velocity(x, t)
    w = effective_guidance(omega, kappa)
    guided = unconditional + w * (conditional - unconditional)
    folded = folded_velocity(conditional, guided, unconditional, t, scales=(omega, kappa))
    torch.testing.assert_close(folded, guided, rtol=1e-9, atol=1e-9)
    # Gaussians of one variance: guidance moves the mean.
    torch.testing.assert_close(guided, Gaussian(-0.4 + w * 1.9, 0.8).velocity(x, t), rtol=1e-9, atol=1e-9)


def test_folded_guidance_of_the_public_settings_and_its_interval() -> None:
    assert effective_guidance(1.0, 0.5) == pytest.approx(2.0)
    assert effective_guidance(0.2, 0.92) == pytest.approx(2.5)
    v, c, u = torch.randn(3, 3, 2, dtype=torch.float64)
    t = fp64(0.5, 0.75, 0.8)
    folded = folded_velocity(v, c, u, t, scales=(0.2, 0.92), interval=(0.0, 0.75))
    expected = 0.2 * v + 0.92 * c - 0.12 * u
    torch.testing.assert_close(folded[:2], expected[:2], rtol=1e-12, atol=1e-14)
    assert torch.equal(folded[2], v[2])
    with pytest.raises(ValueError, match="kappa must be below 1"):
        folded_velocity(v, c, u, t, scales=(1.0, 1.0))


def test_improved_prediction_at_the_optimum() -> None:
    velocity = GAUSSIAN.velocity(X, T)
    u = GAUSSIAN.average_velocity(X, T, R).requires_grad_()
    derivative = along(GAUSSIAN.average_velocity, X, T, R, velocity).requires_grad_()
    prediction = improved_prediction(u, derivative, T, R)
    torch.testing.assert_close(prediction, velocity, rtol=0, atol=1e-10)
    by_u, by_derivative = torch.autograd.grad(prediction.sum(), (u, derivative), allow_unused=True)
    assert by_u.tolist() == [1.0] * 4
    assert by_derivative is None


def test_improved_loss_at_the_optimum_has_a_value_but_no_mean_gradient() -> None:
    n, t, r = 200_000, 0.7, 0.3
    x0, eps = 0.7 + 1.6 * torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    times, ends = torch.full_like(x0, t), torch.full_like(x0, r)
    x = add_noise(x0, eps, times)
    derivative = along(GAUSSIAN.average_velocity, x, times, ends, GAUSSIAN.velocity(x, times))
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    prediction = improved_prediction(GAUSSIAN.average_velocity(x, times, ends) + offset, derivative, times, ends)
    loss = meanflow_loss(prediction, eps - x0, power=0.0).loss
    # The value is the variance of the velocity given x_t.
    variance = 1.6**2 / ((1 - t) ** 2 * 1.6**2 + t**2)
    assert loss.item() == pytest.approx(variance, rel=0.02)
    gradient = torch.autograd.grad(loss, offset)[0].item()
    assert gradient == pytest.approx(0.0, abs=8 * math.sqrt(variance / n))


@given(w=st.floats(1, 8), v=st.floats(-3, 3), u=st.floats(-3, 3))
def test_improved_guidance_has_its_fixed_point_at_w(w: float, v: float, u: float) -> None:
    guided = fp64(u + w * (v - u))
    target = improved_guided_velocity(fp64(v), guided, fp64(u), fp64(w))
    assert target.item() == pytest.approx(guided.item(), abs=1e-9)


def test_cauchy_loss() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    prediction.requires_grad_()
    result = cauchy_loss(prediction, target, constant=0.3)
    error = (prediction - target).square().mean(dim=1).detach()
    assert result.loss.item() == pytest.approx((error + 0.3).log().mean().item(), rel=1e-12)
    gradient = torch.autograd.grad(result.loss, prediction)[0]
    expected = (prediction - target).detach() * 2 / 4 / 3 / (error + 0.3).view(3, 1)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="must be positive"):
        cauchy_loss(prediction, target, constant=0.0)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        meanflow_target(x, x[:1], torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="power and constant"):
        meanflow_loss(x, x, power=-1.0)
