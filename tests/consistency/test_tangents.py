"""Total derivatives: forward mode against differences, borders, several times, dropout, and steps nobody sees."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.trigflow import trig_function
from tests.consistency.analytic import Gaussian, fp64


def function(x: Tensor, t: Tensor) -> Tensor:
    t = t.view(-1, *([1] * (x.ndim - 1)))
    return torch.sin(1.3 * x) * t + 0.4 * x - 0.2 * t.square()


def map_function(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return function(x, t) * torch.exp(-r).view(-1, *([1] * (x.ndim - 1)))


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, dx = torch.randn(2, 3, 4, 2, dtype=dtype)
    return x, torch.tensor([0.3, 0.5, 0.9], dtype=dtype), dx, torch.tensor([1.0, 0.5, 0.0], dtype=dtype)


def test_jvp_is_the_closed_form() -> None:
    x, t, dx, dt = inputs()
    value, derivative = total_derivative(function, x, t, dx, dt)
    time, rate = t.view(3, 1, 1), dt.view(3, 1, 1)
    expected = (1.3 * torch.cos(1.3 * x) * time + 0.4) * dx + (torch.sin(1.3 * x) - 0.4 * time) * rate
    torch.testing.assert_close(derivative, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(value, function(x, t))


def test_scaled_trig_tangent_equals_differences() -> None:
    gaussian = Gaussian(0.3, 0.8, 0.5)
    x, tau = fp64(0.83, -0.4, 1.2), fp64(0.3, 0.9, 1.4)
    network = trig_function(lambda x, t: function(x, t), 0.5)
    scale = torch.cos(tau) * torch.sin(tau)
    dx = 0.5 * gaussian.trig(x, tau)
    _, derivative = total_derivative(network, x, tau, scale * dx, scale)
    h = 1e-5
    difference = (network(x + h * dx, tau + h) - network(x - h * dx, tau - h)) / (2 * h)
    torch.testing.assert_close(derivative, scale * difference, rtol=1e-5, atol=1e-9)


def test_central_difference_converges_with_slope_two() -> None:
    x, t, dx, dt = inputs()
    exact = total_derivative(function, x, t, dx, dt).derivative
    errors = [
        float((total_derivative(function, x, t, dx, dt, method="central", step=h).derivative - exact).abs().max())
        for h in (4e-2, 2e-2, 1e-2)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.05)


def test_borders_are_one_sided_per_sample() -> None:
    x = fp64(0.4, 0.4, 0.4)
    t, h = fp64(0.0, 0.5, 1.0), 0.01
    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return function(x, t)

    one = torch.ones_like(t)
    value = central_derivative(watched, x, t, one, one, step=h, interval=(0.0, 1.0))
    torch.testing.assert_close(seen[0], fp64(0.01, 0.51, 1.0))
    torch.testing.assert_close(seen[1], fp64(0.0, 0.49, 0.99))
    expected = (function(x + fp64(h, h, 0.0), seen[0]) - function(x - fp64(0.0, h, h), seen[1])) / fp64(h, 2 * h, h)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    exact = total_derivative(function, x, t, one, one).derivative
    assert float((value - exact).abs().max()) < 2 * h
    with pytest.raises(ValueError, match=r"samples \[1\] leave"):
        central_derivative(function, x, t, one, one, step=0.6, interval=(0.0, 1.0))


def test_a_time_that_stands_still_may_lie_on_the_border() -> None:
    x, t, r = fp64(0.4, -0.2), fp64(0.5, 0.6), fp64(0.0, 0.0)
    zero, one = torch.zeros_like(r), torch.ones_like(r)
    value = central_derivative(map_function, x, (t, r), one, (one, zero), step=1e-4, interval=(0.0, 1.0))
    exact = total_derivative(map_function, x, (t, r), one, (one, zero)).derivative
    torch.testing.assert_close(value, exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", ["jvp", "central"])
def test_second_time_with_its_own_tangent(method: str) -> None:
    x, t, dx, dt = inputs()
    r, dr = fp64(0.1, 0.2, 0.3), fp64(0.0, -0.5, 2.0)
    if method == "jvp":
        result = total_derivative(map_function, x, (t, r), dx, (dt, dr), method="jvp")
    else:
        result = total_derivative(map_function, x, (t, r), dx, (dt, dr), method="central", step=1e-5)
    inner = total_derivative(function, x, t, dx, dt)
    decay, rate = torch.exp(-r).view(3, 1, 1), dr.view(3, 1, 1)
    torch.testing.assert_close(result.derivative, decay * (inner.derivative - rate * inner.value), rtol=0, atol=1e-8)
    assert torch.equal(result.value, map_function(x, t, r))


@pytest.mark.parametrize("method", ["jvp", "central"])
def test_nothing_has_a_graph_and_weights_stay_clean(method: str) -> None:
    network = nn.Linear(4, 4, dtype=torch.float64)
    x, dx = torch.randn(2, 3, 4, dtype=torch.float64)
    t, one = fp64(0.2, 0.4, 0.6), fp64(1.0, 1.0, 1.0)

    def run(x: Tensor, t: Tensor) -> Tensor:
        return network(x) * t.view(-1, 1)

    step = None if method == "jvp" else 1e-4
    result = total_derivative(run, x.requires_grad_(), t, dx, one, method=method, step=step)  # type: ignore[arg-type]
    assert not result.value.requires_grad
    assert not result.derivative.requires_grad
    expected = (dx @ network.weight.T) * t.view(-1, 1) + network(x)
    torch.testing.assert_close(result.derivative, expected.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["jvp", "central"])
def test_dropout_masks_agree_and_the_random_state_is_restored(method: str) -> None:
    dropout = nn.Dropout(0.5)
    x, t = torch.randn(4, 50, dtype=torch.float64), fp64(0.2, 0.4, 0.6, 0.8)
    dx, dt = torch.randn(4, 50, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    state = torch.random.get_rng_state()
    step = None if method == "jvp" else 1e-3
    result = total_derivative(lambda x, t: dropout(x), x, t, dx, dt, method=method, step=step)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    value = dropout(x)
    assert torch.equal(result.value, value)
    mask = value / x
    torch.testing.assert_close(result.derivative, mask * dx, rtol=0, atol=1e-10)
    assert 0.3 < float((mask == 0).double().mean()) < 0.7


def test_end_of_the_angle_moves_nothing_and_is_not_refused() -> None:
    tau = torch.full((3,), math.pi / 2)
    scale = torch.cos(tau) * torch.sin(tau)
    x = torch.randn(3)
    assert central_derivative(lambda x, t: x * t, x, tau, scale * x, scale, step=5e-3).abs().max().item() < 1e-5


def test_bad_arguments_are_named() -> None:
    x, t, dx, dt = inputs()
    with pytest.raises(ValueError, match="tangent of x must have its shape"):
        total_derivative(function, x, t, dx[:, :1], dt)
    with pytest.raises(ValueError, match="each time needs a tangent"):
        total_derivative(map_function, x, (t, t), dx, dt)
    with pytest.raises(ValueError, match=r"fp32 or fp64"):
        total_derivative(function, x, t.bfloat16(), dx, dt)
    with pytest.raises(ValueError, match="needs a step"):
        total_derivative(function, x, t, dx, dt, method="central")
    with pytest.raises(ValueError, match="belong to method 'central'"):
        total_derivative(function, x, t, dx, dt, step=0.1)
    with pytest.raises(ValueError, match="choose jvp or central"):
        total_derivative(function, x, t, dx, dt, method="forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be positive"):
        central_derivative(function, x, t, dx, dt, step=0.0)
