"""Discrete consistency: exact steps, slope of the discretisation error, metrics, weights and boundaries."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.consistency.methods.dcm import (
    consistency_distillation_loss,
    teacher_step,
)
from fewstep.consistency.methods.ect import ect_weight, pseudo_huber_loss, shared_noise_states
from fewstep.consistency.methods.scm import flow_tangent
from fewstep.consistency.sample_loss import pseudo_huber
from fewstep.consistency.tangents import total_derivative
from fewstep.core.grids import step_grid
from fewstep.core.paths import add_noise, x0_from_velocity
from tests.consistency.analytic import BIMODAL, Gaussian, fp64

GAUSSIAN = Gaussian()
X = fp64(0.83, -1.4, 0.2)
T = fp64(0.3, 0.6, 0.9)


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(1.3 * x) * t + 0.4 * x - 0.2 * t.square()


def slope(errors: list[float]) -> float:
    """Order of convergence over halvings."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


def test_euler_step_is_exact_on_one_pair_and_second_order_on_a_teacher() -> None:
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    r = fp64(0.0, 0.2, 0.9)
    x_r = teacher_step(add_noise(x0, eps, T), eps - x0, T, r)
    torch.testing.assert_close(x_r, add_noise(x0, eps, r), rtol=0, atol=1e-14)
    errors = []
    for h in (0.08, 0.04, 0.02, 0.01):
        step = teacher_step(X, GAUSSIAN.velocity(X, T), T, T - h)
        errors.append(float((step - GAUSSIAN.flow_map(X, T, T - h)).abs().max()))
    assert slope(errors) == pytest.approx(2, abs=0.1)


def test_discrete_gradient_over_the_step_is_the_continuous_one() -> None:
    velocity = BIMODAL.velocity(X, T)
    value, derivative = total_derivative(nonlinear, X, T, velocity, torch.ones_like(T))
    h = flow_tangent(value, velocity, derivative, T).total
    errors = []
    for step in (0.02, 0.01, 0.005, 0.0025):
        r = T - step
        x_r = teacher_step(X, velocity, T, r)
        target = x0_from_velocity(x_r, nonlinear(x_r, r), r)
        network = nonlinear(X, T).requires_grad_()
        loss = consistency_distillation_loss(x0_from_velocity(X, network, T), target, reduction="sum").loss
        gradient = torch.autograd.grad(loss, network)[0] / step
        # Gradient of the continuous loss |v - stop(v) - h|^2, times df/dv = -t from the x0 space.
        errors.append(float((gradient - -2 * T * h / 3).abs().max()))
    assert slope(errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.01


def test_converged_discrete_student_is_off_by_one_over_n() -> None:
    # The fixed point of dCM maps a state to the end of the teacher's Euler path.
    errors = []
    for steps in (20, 40, 80, 160):
        x, times = fp64(0.4, -1.2), (*step_grid(steps), 0.0)
        for start, end in pairwise(times):
            t, r = fp64(start, start), fp64(end, end)
            x = teacher_step(x, GAUSSIAN.velocity(x, t), t, r)
        exact = GAUSSIAN.consistency(fp64(0.4, -1.2), fp64(1.0, 1.0))
        errors.append(float((x - exact).abs().max()))
    assert slope(errors) == pytest.approx(1, abs=0.15)


def test_training_pair_shares_data_and_noise() -> None:
    x0, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    r = fp64(0.0, 0.2, 0.5)
    x_t, x_r = shared_noise_states(x0, eps, T, r)
    assert torch.equal(x_r[0], x0[0])
    shift = (T - r).view(3, 1) * (eps - x0)
    torch.testing.assert_close(x_t - x_r, shift, rtol=0, atol=1e-14)
    same, other = shared_noise_states(x0, eps, T, T)
    assert torch.equal(same, other)
    assert consistency_distillation_loss(same, other).loss.item() == 0.0
    with pytest.raises(ValueError, match="one shape"):
        shared_noise_states(x0, eps[:1], T, r)


@pytest.mark.parametrize(("reduction", "size"), [("mean", 4), ("sum", 1)])
def test_distillation_loss_and_who_gets_its_gradient(reduction: str, size: int) -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    weight = fp64(1.0, 0.0, 2.0)
    result = consistency_distillation_loss(prediction, target, reduction=reduction, weight=weight)  # type: ignore[arg-type]
    gradient = torch.autograd.grad(result.loss, (prediction, target), allow_unused=True)
    difference = (prediction - target).detach()
    torch.testing.assert_close(gradient[0], 2 * weight.view(3, 1) * difference / (3 * size), rtol=1e-12, atol=0)
    assert gradient[1] is None
    torch.testing.assert_close(result.error, difference.square().sum(dim=1) / size, rtol=1e-12, atol=0)


def test_broken_samples_are_isolated() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    clean = consistency_distillation_loss(prediction, target)
    target[1, 2] = math.nan
    leaf = prediction.clone().requires_grad_()
    result = consistency_distillation_loss(leaf, target, weight=fp64(1.0, math.inf, 1.0))
    assert result.isolated.tolist() == [False, True, False]
    assert result.loss.item() == pytest.approx(float(clean.error[[0, 2]].sum()) / 3)
    gradient = torch.autograd.grad(result.loss, leaf)[0]
    assert gradient[1].abs().max().item() == 0.0
    assert bool(gradient.isfinite().all())
    assert int(pseudo_huber_loss(prediction, target, constant=0.0).isolated_count) == 1


@given(value=st.floats(0, 1e4), constant=st.floats(0, 10))
def test_pseudo_huber(value: float, constant: float) -> None:
    squares = fp64(value * value).requires_grad_()
    result = pseudo_huber(squares, constant)
    assert result.item() == pytest.approx(math.hypot(value, constant) - constant, rel=1e-9, abs=1e-9)
    assert bool(torch.autograd.grad(result.sum(), squares)[0].isfinite().all())


def test_pseudo_huber_loss() -> None:
    prediction, target = torch.randn(2, 3, 4, dtype=torch.float64)
    prediction.requires_grad_()
    result = pseudo_huber_loss(prediction, target, constant=0.06, weight=fp64(1.0, 3.0, 0.5))
    squares = (prediction - target).square().sum(dim=1).detach()
    expected = (squares + 0.0036).sqrt() - 0.06
    torch.testing.assert_close(result.error, expected, rtol=1e-12, atol=0)
    assert result.loss.item() == pytest.approx(((fp64(1.0, 3.0, 0.5) * expected).mean()).item(), rel=1e-12)
    # An exact prediction, c = 0: no gradient, and no nan.
    exact = target.clone().requires_grad_()
    gradient = torch.autograd.grad(pseudo_huber_loss(exact, target, constant=0.0).loss, exact)[0]
    assert gradient.abs().max().item() == 0.0
    with pytest.raises(ValueError, match="constant must be 0 or more"):
        pseudo_huber_loss(prediction, target, constant=-1.0)


@given(sigma=st.floats(0.01, 50), ratio=st.floats(0, 0.99), sd=st.floats(0.2, 2))
def test_ect_weights_in_their_own_units(sigma: float, ratio: float, sd: float) -> None:
    t, r = fp64(sigma / (1 + sigma)), fp64(sigma * ratio / (1 + sigma * ratio))
    snr = ect_weight(t, r, kind="snr", sigma_data=sd).item()
    assert snr == pytest.approx((sigma**2 + sd**2) / (sigma * sd) ** 2, rel=1e-9)
    assert ect_weight(t, r, kind="gap").item() == pytest.approx(1 / (sigma - sigma * ratio), rel=1e-9)


def test_bad_arguments_are_named() -> None:
    x, t = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="choose snr or gap"):
        ect_weight(t, t, kind="sigma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        ect_weight(t, t, sigma_data=0.0)
    with pytest.raises(ValueError, match="one shape"):
        teacher_step(x, x[:, :1], t, t)
    with pytest.raises(ValueError, match="one shape"):
        consistency_distillation_loss(x, x[:1])
