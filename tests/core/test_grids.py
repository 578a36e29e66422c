"""Shift, step grids, and the stock scheduler that reproduces them."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.core.grids import (
    euler_scheduler_parameters,
    shift_of_grid,
    shift_time,
    step_grid,
    unshift_time,
    validate_grid,
)


def make_scheduler(
    shift: float, shift_terminal: float | None, *, num_train_timesteps: int
) -> FlowMatchEulerDiscreteScheduler:
    # from_config, for the annotation of shift_terminal leaves out its default None.
    config = {"num_train_timesteps": num_train_timesteps, "shift": shift, "shift_terminal": shift_terminal}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    return scheduler


SHIFTS = st.floats(0.1, 20)
TIMES = st.floats(0, 1)


def test_reference_grids() -> None:
    assert step_grid(4, shift=5) == pytest.approx((1, 0.9375, 5 / 6, 0.625), abs=1e-15)
    assert step_grid(4) == (1.0, 0.75, 0.5, 0.25)
    assert step_grid(1, shift=3) == (1.0,)
    assert step_grid(3, shift=8) == pytest.approx((1, 16 / 17, 0.8), abs=1e-15)
    assert step_grid(2, start=0.8) == pytest.approx((0.8, 0.4), abs=1e-15)


@settings(max_examples=50, deadline=None)
@given(t=TIMES, a=SHIFTS, b=SHIFTS)
def test_shifts_compose_by_multiplication(t: float, a: float, b: float) -> None:
    assert shift_time(shift_time(t, a), b) == pytest.approx(shift_time(t, a * b), abs=1e-12)
    assert unshift_time(shift_time(t, a), a) == pytest.approx(t, abs=1e-12)
    assert shift_time(t, 1.0) == t


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 60), shift=SHIFTS, start=st.floats(0.05, 1))
def test_grids_fall_strictly(steps: int, shift: float, start: float) -> None:
    times = step_grid(steps, shift=shift, start=start)
    validate_grid(times)
    assert len(times) == steps
    assert times[0] == pytest.approx(shift_time(start, shift), abs=1e-15)


def test_shift_of_tensors() -> None:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = torch.tensor([0, 3 / 6, 6 / 8, 9 / 10, 1], dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 3.0), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shifts(shift: float) -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        shift_time(0.5, shift)
    with pytest.raises(ValueError, match="shift must be positive"):
        unshift_time(0.5, shift)
    with pytest.raises(ValueError, match="shift must be positive"):
        step_grid(4, shift=shift)


def test_bad_grid_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        step_grid(0)
    with pytest.raises(ValueError, match="start"):
        step_grid(2, start=0)
    with pytest.raises(ValueError, match="start"):
        step_grid(2, start=1.1)


@pytest.mark.parametrize("times", [(), (1.0, 0.0), (1.2, 0.5), (0.5, 0.5), (0.5, 0.7), (math.nan,), (1.0, -0.1)])
def test_bad_grids(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"times|empty"):
        validate_grid(times)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(2, 12), shift=SHIFTS)
def test_shift_of_grid_finds_the_shift(steps: int, shift: float) -> None:
    assert shift_of_grid(step_grid(steps, shift=shift)) == pytest.approx(shift, rel=1e-9)


def test_shift_of_other_grids() -> None:
    assert shift_of_grid((1.0,)) == 1.0
    assert shift_of_grid((0.9,)) is None
    assert shift_of_grid((0.9, 0.45)) is None
    assert shift_of_grid((1.0, 0.7, 0.5)) is None
    assert shift_of_grid((1.0, 0.3)) == pytest.approx(3 / 7, abs=1e-12)
    with pytest.raises(ValueError, match="fall strictly"):
        shift_of_grid((1.0, 0.5, 0.6))


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5, 3.0, 5.0, 8.0])
def test_stock_euler_scheduler_steps_on_our_grid(steps: int, shift: float) -> None:
    k, terminal = euler_scheduler_parameters(steps, shift)
    scheduler = make_scheduler(k, terminal, num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    expected = 1000 * torch.tensor(step_grid(steps, shift=shift))
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=0, atol=1e-3)
    assert torch.as_tensor(scheduler.sigmas)[-1].item() == 0


def test_stock_euler_scheduler_with_another_table_length() -> None:
    k, terminal = euler_scheduler_parameters(4, 3.0, num_train_timesteps=250)
    scheduler = make_scheduler(k, terminal, num_train_timesteps=250)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(
        torch.as_tensor(scheduler.sigmas)[:-1], torch.tensor(step_grid(4, shift=3.0)), rtol=0, atol=1e-6
    )


def test_euler_scheduler_parameters_values_and_errors() -> None:
    assert euler_scheduler_parameters(1, 5.0) == (1.0, None)
    assert euler_scheduler_parameters(4, 1.0) == (1.0, 0.25)
    with pytest.raises(ValueError, match="smaller shift, fewer steps"):
        euler_scheduler_parameters(100, 200.0)
    with pytest.raises(ValueError, match="num_train_timesteps"):
        euler_scheduler_parameters(4, 1.0, num_train_timesteps=1)
