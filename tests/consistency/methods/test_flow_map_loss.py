"""Flow maps: exact jumps on any grid, AnyFlow's target, guidance and weights, and the three-jump simulation."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewstep.consistency.methods.anyflow import (
    Jump,
    anyflow_target,
    backward_simulation,
    flow_map_jump,
    fuse_guidance,
    match_scale,
    simulate,
    time_weight,
)
from fewstep.consistency.methods.meanflow import meanflow_target
from fewstep.consistency.tangents import central_derivative
from fewstep.consistency.times import anyflow_times
from fewstep.core.grids import step_grid, validate_grid
from tests.consistency.analytic import BIMODAL, Gaussian, fp64

GAUSSIAN = Gaussian()


@torch.no_grad()
def sample_flow_map(function: Any, noise: Tensor, times: Sequence[float]) -> Tensor:
    """Jumps through `times`, then to 0, [B, ...], without graph. Deterministic; any grid, `step_grid` for instance.

    Raises:
        ValueError: the times are no grid, see `validate_grid`.
    """
    validate_grid(times)
    x = noise
    for t, r in zip(times, (*times[1:], 0.0), strict=True):
        start, end = (torch.full((len(x),), value, dtype=x.dtype) for value in (t, r))
        x = flow_map_jump(x, function(x, start, end), start, end)
    return x


def constant_velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return GAUSSIAN.velocity(x, t)


def test_jump_with_the_average_velocity_is_the_flow() -> None:
    x, t, r = fp64(0.4, -0.9), fp64(0.73, 1.0), fp64(0.21, 0.0)
    moved = flow_map_jump(x, GAUSSIAN.average_velocity(x, t, r), t, r)
    torch.testing.assert_close(moved, GAUSSIAN.flow_map(x, t, r), rtol=0, atol=1e-14)
    assert moved.tolist() == pytest.approx([GAUSSIAN.flow_map(x, t, r)[0].item(), 0.7 - 1.6 * 0.9])


@settings(deadline=None, max_examples=30)
@given(times=st.lists(st.floats(0.01, 0.99), max_size=6, unique=True))
def test_any_grid_is_exact_with_the_exact_map(times: list[float]) -> None:
    grid = (1.0, *sorted(times, reverse=True))
    noise = fp64(0.4, -1.2, 2.0)
    sample = sample_flow_map(GAUSSIAN.average_velocity, noise, grid)
    torch.testing.assert_close(sample, 0.7 + 1.6 * noise, rtol=0, atol=1e-12)


def test_plain_velocity_collapses_where_the_map_does_not() -> None:
    noise = fp64(-1.0, 1.0)
    spreads = [
        float(sample_flow_map(constant_velocity, noise, step_grid(steps)).std(correction=0)) for steps in (1, 2, 4)
    ]
    assert spreads == pytest.approx([0.0, 0.719, 1.123], abs=1e-3)
    exact = [
        float(sample_flow_map(GAUSSIAN.average_velocity, noise, step_grid(k)).std(correction=0)) for k in (1, 2, 4)
    ]
    assert exact == pytest.approx([1.6, 1.6, 1.6])


def test_target_is_exact_and_its_difference_second_order() -> None:
    x, t, r = fp64(0.4, -0.9, 1.2), fp64(0.73, 0.5, 0.9), fp64(0.21, 0.1, 0.9)
    velocity = GAUSSIAN.velocity(x, t)
    tangents = (torch.ones_like(t), torch.zeros_like(r))
    errors = []
    for h in (0.02, 0.01, 0.005):
        derivative = central_derivative(GAUSSIAN.average_velocity, x, (t, r), velocity, tangents, step=h)
        target = anyflow_target(velocity, derivative, t, r)
        assert torch.equal(target, meanflow_target(velocity, derivative, t, r))
        errors.append(float((target - GAUSSIAN.average_velocity(x, t, r)).abs().max()))
    assert errors[-1] < 1e-4
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(2, abs=0.1)


def test_differences_at_the_ends_stay_inside() -> None:
    seen: list[float] = []

    def watched(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return GAUSSIAN.average_velocity(x, t, r)

    x, t, r = fp64(0.4, -0.9), fp64(1.0, 0.998), fp64(0.0, 0.5)
    velocity, tangents = GAUSSIAN.velocity(x, t), (torch.ones_like(t), torch.zeros_like(r))
    derivative = central_derivative(watched, x, (t, r), velocity, tangents, step=5e-3, interval=(0.0, 1.0))
    target = anyflow_target(velocity, derivative, t, r)
    assert max(seen) <= 1.0
    torch.testing.assert_close(target, GAUSSIAN.average_velocity(x, t, r), rtol=0, atol=2e-2)


@given(guidance=st.floats(0.5, 8), c=st.floats(-3, 3), u=st.floats(-3, 3))
def test_fused_guidance_has_its_fixed_point_at_the_scale(guidance: float, c: float, u: float) -> None:
    guided = fp64(u + guidance * (c - u)).requires_grad_()
    unconditional = fp64(u).requires_grad_()
    fused = fuse_guidance(guided, unconditional, guidance=guidance)
    assert fused.item() == pytest.approx(c, abs=1e-9)
    by_guided, by_unconditional = torch.autograd.grad(fused.sum(), (guided, unconditional), allow_unused=True)
    assert by_guided.item() == pytest.approx(1 / guidance)
    assert by_unconditional is None


def test_guided_target_divides_the_derivative() -> None:
    velocity, derivative = torch.randn(2, 2, 3, dtype=torch.float64)
    t, r = fp64(0.8, 0.5), fp64(0.2, 0.5)
    target = anyflow_target(velocity, derivative, t, r, guidance=3.0)
    torch.testing.assert_close(target[0], velocity[0] - 0.2 * derivative[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(target[1], velocity[1])
    with pytest.raises(ValueError, match="guidance must be positive"):
        anyflow_target(velocity, derivative, t, r, guidance=0.0)
    with pytest.raises(ValueError, match="guidance must be positive"):
        fuse_guidance(velocity, velocity, guidance=-1.0)


def test_time_weight_has_mean_one_and_vanishes_at_both_ends() -> None:
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert time_weight(t).mean().item() == pytest.approx(1.0, abs=1e-6)
    assert time_weight(fp64(0.0, 1.0, 2 / 3)).tolist() == pytest.approx([0.0, 0.0, 2 / 3 * math.sqrt(1 / 3) * 15 / 4])


def test_matched_scales_keep_directions() -> None:
    prediction, target = torch.randn(2, 8, 5, dtype=torch.float64)
    prediction.requires_grad_()
    first, second = torch.rand(2, 8, dtype=torch.float64)
    pair = anyflow_times(first, second, torch.arange(8))
    error = (prediction - target).square().mean(dim=1)
    matched = match_scale(error, pair.equal)
    reference = error[pair.equal].mean().item()
    assert torch.equal(matched[pair.equal], error[pair.equal])
    assert matched[~pair.equal].tolist() == pytest.approx([reference] * 4, rel=1e-3)
    plain = torch.autograd.grad(error.sum(), prediction, retain_graph=True)[0]
    scaled = torch.autograd.grad(matched.sum(), prediction, retain_graph=True)[0]
    cosine = torch.cosine_similarity(plain, scaled, dim=1)
    torch.testing.assert_close(cosine, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled[2], plain[2] * reference / (error[2].item() + 1e-5), rtol=1e-12, atol=0)
    shared = match_scale(error, torch.zeros(8, dtype=torch.bool), reference=fp64(2.0)[0])
    assert shared.tolist() == pytest.approx([2.0] * 8, rel=1e-3)
    with pytest.raises(ValueError, match="no sample of this batch has r = t"):
        match_scale(error, torch.zeros(8, dtype=torch.bool))


@pytest.mark.parametrize("steps", [1, 2, 4, 16, 50])
def test_three_jumps_reach_what_all_steps_reach(steps: int) -> None:
    noise = fp64(0.4, -1.2)
    for segment in range(steps):
        jumps = backward_simulation(steps, segment, shift=5.0)
        grid = (*step_grid(steps, shift=5.0), 0.0)
        trained = [jump for jump in jumps if jump.trained]
        assert trained == [Jump(grid[segment], grid[segment + 1], True)]
        assert len(jumps) == 3 - (segment == 0) - (segment == steps - 1)
        assert (jumps[0].t, jumps[-1].r) == (1.0, 0.0)
        end = simulate(GAUSSIAN.average_velocity, noise, jumps)
        torch.testing.assert_close(end, 0.7 + 1.6 * noise, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="segment must be from 0"):
        backward_simulation(steps, steps)


def test_simulated_mixture_keeps_the_flow() -> None:
    noise = fp64(0.4, -1.2)
    end = simulate(BIMODAL.average_velocity, noise, backward_simulation(4, 2))
    torch.testing.assert_close(end, BIMODAL.consistency(noise, torch.ones_like(noise)), rtol=0, atol=1e-6)


def test_gradient_of_the_simulation() -> None:
    network = nn.Linear(3, 1, dtype=torch.float64)
    called: list[bool] = []

    def function(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        called.append(torch.is_grad_enabled())
        return network(torch.stack([x, t, r], dim=1)).squeeze(1)

    def frozen(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        weight, bias = network.weight.detach(), network.bias.detach()
        return (torch.stack([x, t, r], dim=1) @ weight.T + bias).squeeze(1)

    noise, jumps = fp64(0.4, -1.2), backward_simulation(4, 1)
    free = simulate(function, noise, jumps)
    assert called == [False, True, True]
    held = simulate(function, noise, jumps, frozen_function=frozen)
    assert called == [False, True, True, True]
    torch.testing.assert_close(free, held, rtol=0, atol=1e-14)
    gradient = torch.autograd.grad(held.sum(), network.bias)[0].item()
    # Through the state of the last jump alone: d x_r / d bias = -(t - r), times 1 - r w_x.
    _, trained, last = jumps
    expected = -2 * (trained.t - trained.r) * (1 - last.t * network.weight[0, 0].item())
    assert gradient == pytest.approx(expected)
    assert torch.autograd.grad(free.sum(), network.bias)[0].item() == pytest.approx(expected - 2 * last.t)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="at least one jump"):
        simulate(constant_velocity, x, ())
    with pytest.raises(ValueError, match="do not join"):
        simulate(constant_velocity, x, (Jump(1.0, 0.5, True), Jump(0.4, 0.0, False)))
    with pytest.raises(ValueError, match="must fall strictly"):
        sample_flow_map(constant_velocity, x, (0.5, 0.5))
    with pytest.raises(ValueError, match="one shape"):
        flow_map_jump(x, x[:1], x, x)
