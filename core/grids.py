"""Times on the canonical path: the shift, the grid a student steps on, and the stock scheduler that gives that grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

Time = TypeVar("Time", float, Tensor)


def shift_time(t: Time, shift: float) -> Time:
    """shift t / (1 + (shift - 1) t), which moves times towards noise for shift > 1 (SD3, arXiv:2403.03206, Eq. 23).

    Shifts compose by multiplication; 0 and 1 stay where they are.

    Raises:
        ValueError: the shift is not positive.
    """
    _require_positive_shift(shift)
    # This form of the denominator keeps 1 exactly at 1 and nothing above it.
    return shift * t / (shift * t + (1 - t))


def unshift_time(t: Time, shift: float) -> Time:
    """Inverse of `shift_time`: t / (shift - (shift - 1) t).

    Raises:
        ValueError: the shift is not positive.
    """
    _require_positive_shift(shift)
    return t / (t + shift * (1 - t))


def step_grid(steps: int, *, shift: float = 1.0, start: float = 1.0) -> tuple[float, ...]:
    """Times at which a few-step sampler calls its network: shifted start (1 - i / steps), i = 0 ... steps - 1.

    Strictly decreasing; the final 0 is not in it, since no network is called there.

    Args:
        steps: number of network calls, at least 1.
        shift: see `shift_time`.
        start: first time before the shift, in (0, 1].

    Raises:
        ValueError: an argument is out of its range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < start <= 1:
        raise ValueError(f"start must lie in (0, 1], got {start}")
    # (steps - i) / steps rounds once where 1 - i / steps rounds twice.
    return tuple(shift_time(start * (steps - i) / steps, shift) for i in range(steps))


def validate_grid(times: Sequence[float]) -> None:
    """Check that times can be stepped through: at least one, in (0, 1], strictly decreasing.

    Raises:
        ValueError: they cannot, naming the offending entry.
    """
    if len(times) == 0:
        raise ValueError("the step grid is empty: give at least one time in (0, 1]")
    for i, t in enumerate(times):
        if not 0 < t <= 1:
            raise ValueError(f"times must lie in (0, 1] (the final 0 is implied), got {t} at position {i}")
        if i > 0 and t >= times[i - 1]:
            raise ValueError(f"times must fall strictly, got {times[i - 1]} then {t} at position {i}")


def shift_of_grid(times: Sequence[float]) -> float | None:
    """The shift k with `step_grid(len(times), shift=k) == times` to 1e-6, or None where there is none.

    A grid of one step that starts at 1 has every shift; 1.0 is given.

    Raises:
        ValueError: the times are no grid, see `validate_grid`.
    """
    validate_grid(times)
    steps = len(times)
    if abs(times[0] - 1) > 1e-6:
        return None
    if steps == 1:
        return 1.0
    # The second time, shift_time(1 - 1 / steps), solved for the shift.
    if times[1] >= 1:
        return None
    shift = times[1] / ((steps - 1) * (1 - times[1]))
    expected = step_grid(steps, shift=shift)
    fits = all(abs(a - b) <= 1e-6 for a, b in zip(times, expected, strict=True))
    return shift if fits else None


def euler_scheduler_parameters(
    steps: int, shift: float, *, num_train_timesteps: int = 1000
) -> tuple[float, float | None]:
    """(shift, shift_terminal) with which diffusers' FlowMatchEulerDiscreteScheduler steps on `step_grid(steps, shift)`.

    That scheduler takes K equally spaced values from 1 to m, its smallest sigma, which its constructor has shifted
    once: m = k' mu / (1 + (k' - 1) mu), mu = 1 / num_train_timesteps. It shifts them by k' and stretches 1 - s so that
    the last one is shift_terminal. One minus the i-th value is then proportional to
    i / (1 - (1 - 1/k') (1 - m) i / (K - 1)), and the same quantity on the wanted grid to i / (1 - (1 - 1/k) i / K).
    They agree for every i when 1/k' = 1 - c / (1 - m) with c = (1 - 1/k) (K - 1) / K; with m inserted that is a
    quadratic in k'.

    Returns:
        k' and the last time of the grid; (1.0, None) for one step, which stays at 1 and cannot be stretched.

    Raises:
        ValueError: an argument is out of range, or no k' exists (a very large shift with many steps).
    """
    terminal = step_grid(steps, shift=shift)[-1]
    if num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps must be at least 2, got {num_train_timesteps}")
    if steps == 1:
        return 1.0, None
    c = (1 - 1 / shift) * (steps - 1) / steps
    quadratic = c / (num_train_timesteps - 1)
    discriminant = (1 - c) ** 2 - 4 * quadratic
    if discriminant < 0:
        raise ValueError(
            f"no FlowMatchEulerDiscreteScheduler of {num_train_timesteps} train timesteps gives the {steps}-step grid "
            f"of shift {shift}: use a smaller shift, fewer steps, or pass the times to the pipeline"
        )
    return 2 / (1 - c + math.sqrt(discriminant)), terminal


def three_step_parameters(times: Sequence[float], *, num_train_timesteps: int = 1000) -> tuple[float, float] | None:
    """(shift, shift_terminal) with which that scheduler steps on (1, a, b), or None where no shift does.

    With m its smallest value (see `euler_scheduler_parameters`) and (1 + m) / 2 the middle one, the stretch keeps
    (1 - a) / (1 - b) = (1 + (k' - 1) m) / (2 + (k' - 1) (1 + m)), which falls in k' from 1/30 to 30: halving finds it.
    FastWan's 1, 0.757, 0.522 is such a grid, and no even one with a shift.

    Raises:
        ValueError: these are not three falling times from 1 on.
    """
    validate_grid(times)
    if len(times) != 3 or times[0] != 1:
        raise ValueError(f"three times from 1 on are needed, got {tuple(times)}")
    wanted, mu = (1 - times[1]) / (1 - times[2]), 1 / num_train_timesteps

    def ratio(shift: float) -> float:
        smallest = shift_time(mu, shift)
        return (1 + (shift - 1) * smallest) / (2 + (shift - 1) * (1 + smallest))

    low, high = 1 / 30, 30.0
    if not ratio(high) < wanted < ratio(low):
        return None
    # In steps of equal factors, until neighbouring numbers are reached.
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if ratio(middle) > wanted else (low, middle)
    return low, times[2]


def _require_positive_shift(shift: float) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite, got {shift}; 1 means no shift")
