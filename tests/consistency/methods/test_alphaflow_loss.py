"""AlphaFlow: its two ends, its bias, its weight and its schedule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.consistency.methods.alphaflow import alpha_schedule, alphaflow_loss, alphaflow_state, alphaflow_target
from fewstep.consistency.methods.meanflow import meanflow_loss, meanflow_target
from fewstep.consistency.tangents import total_derivative
from tests.consistency.analytic import Gaussian, fp64

GAUSSIAN = Gaussian()
X, T, R = fp64(0.5, -0.9, 1.7), fp64(0.9, 0.5, 1.0), fp64(0.2, 0.0, 0.6)


def student(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return torch.sin(1.3 * x) * t + 0.4 * x - 0.2 * t.square() + 0.3 * r * x


def target_of(function: object, alpha: float) -> Tensor:
    """AlphaFlow's target at (X, T, R) with the exact velocity."""
    velocity = GAUSSIAN.velocity(X, T)
    x_s, s = alphaflow_state(X, velocity, T, R, alpha=alpha)
    return alphaflow_target(velocity, function(x_s, s, R), alpha=alpha)  # type: ignore[operator]


def test_bias_of_the_optimum_at_each_alpha() -> None:
    exact = GAUSSIAN.average_velocity(X, T, R)
    found = [float(((target_of(GAUSSIAN.average_velocity, a) - exact) / a)[0]) for a in (0.4, 0.2, 0.1, 0.05, 0.025)]
    assert found == pytest.approx([0.380, 0.184, 0.086, 0.041, 0.020], abs=1e-3)


def test_alpha_one_is_trajectory_flow_matching() -> None:
    velocity = GAUSSIAN.velocity(X, T)
    assert torch.equal(alphaflow_target(velocity, torch.full_like(X, 7.0), alpha=1.0), velocity)
    x_s, s = alphaflow_state(X, velocity, T, R, alpha=1.0)
    torch.testing.assert_close(s, R, rtol=0, atol=1e-15)
    torch.testing.assert_close(x_s, X - (T - R) * velocity, rtol=0, atol=1e-15)
    prediction = student(X, T, R).requires_grad_()
    alpha = torch.autograd.grad(alphaflow_loss(prediction, velocity, alpha=1.0, constant=None).loss, prediction)[0]
    plain = torch.autograd.grad(meanflow_loss(prediction, velocity, power=0.0).loss, prediction)[0]
    assert torch.equal(alpha, plain)


def test_alpha_to_zero_is_meanflow() -> None:
    velocity = GAUSSIAN.velocity(X, T)
    prediction = student(X, T, R).requires_grad_()
    tangents = (torch.ones_like(T), torch.zeros_like(R))
    derivative = total_derivative(student, X, (T, R), velocity, tangents).derivative
    mean = meanflow_loss(prediction, meanflow_target(velocity, derivative, T, R), power=0.0).loss
    expected = torch.autograd.grad(mean, prediction)[0]
    errors = []
    for alpha in (4e-3, 2e-3, 1e-3):
        loss = alphaflow_loss(prediction, target_of(student, alpha), alpha=alpha, constant=None).loss
        gradient = torch.autograd.grad(loss, prediction)[0]
        errors.append(float((gradient - expected).norm() / expected.norm()))
    assert errors[2] < 1e-2
    assert errors[0] / errors[2] == pytest.approx(4, rel=0.05)


@given(t=st.floats(0, 1), share=st.floats(0, 1), alpha=st.floats(1e-3, 1))
def test_intermediate_time_lies_between(t: float, share: float, alpha: float) -> None:
    r = t * share
    x_s, s = alphaflow_state(fp64(0.3), fp64(2.0), fp64(t), fp64(r), alpha=alpha)
    assert r - 1e-15 <= s.item() <= t
    assert x_s.item() == pytest.approx(0.3 - (t - s.item()) * 2.0)


def test_adaptive_weight_and_gradients() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    result = alphaflow_loss(prediction, target, alpha=0.3, constant=1e-3)
    error = (prediction - target).square().sum(dim=1).detach()
    assert result.loss.item() == pytest.approx((0.3 * error / (error + 1e-3)).mean().item(), rel=1e-12)
    by_prediction, by_target = torch.autograd.grad(result.loss, (prediction, target), allow_unused=True)
    assert by_target is None
    expected = 2 / 3 * 0.3 * (prediction - target).detach() / (error + 1e-3).view(3, 1)
    torch.testing.assert_close(by_prediction, expected, rtol=1e-12, atol=0)


def test_schedule() -> None:
    values = [alpha_schedule(i / 100) for i in range(101)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert alpha_schedule(0.5) == pytest.approx(0.5)
    assert alpha_schedule(0.54) == pytest.approx(1 - 1 / (1 + 2.718281828**-1.0), abs=1e-6)
    assert alpha_schedule(0.3, start=0.2, end=0.4) == pytest.approx(0.5)
    assert min(value for value in values if value > 0) >= 5e-3
    assert alpha_schedule(1.0, temperature=1e6, floor=0.0) == 0.0
    for bad in ({"start": 0.5, "end": 0.5}, {"temperature": 0.0}, {"floor": 0.5}):
        with pytest.raises(ValueError, match="need start < end"):
            alpha_schedule(0.5, **bad)
    with pytest.raises(ValueError, match="progress must lie"):
        alpha_schedule(1.2)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="at 0 take meanflow_loss"):
        alphaflow_target(x, x, alpha=0.0)
    with pytest.raises(ValueError, match="None for the plain loss"):
        alphaflow_loss(x, x, alpha=0.5, constant=0.0)
