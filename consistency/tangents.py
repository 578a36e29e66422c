"""Total derivatives of a network along a trajectory: forward mode, or central differences.

    d/ds function(x + s dx, time + s dtime)   at s = 0

Legend: B batch; x, dx [B, ...]; time, dtime [B], or tuples of such for functions of several times, as (t, r) of a flow
map; the function is then called as function(x, t, r). An r that does not move has a zero tangent.

Give the bare network, not its DDP wrapper: hooks of the wrapper would not fire in a forward pass without backward.
Each call starts from the same random state, which is restored at the end, so that dropout masks agree with each other
and with those of the forward pass that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.consistency.sections import TangentConfig

Times = Tensor | tuple[Tensor, ...]
Function = Callable[..., Tensor]


class ValueAndDerivative(NamedTuple):
    """function(x, time) and its total derivative, both [B, ...], without graph."""

    value: Tensor
    derivative: Tensor


def total_derivative(
    function: Function,
    x: Tensor,
    time: Times,
    dx: Tensor,
    dtime: Times,
    *,
    method: Literal["jvp", "central"] = "jvp",
    step: float | None = None,
    interval: tuple[float, float] | None = None,
) -> ValueAndDerivative:
    """Value and total derivative at (x, time) along (dx, dtime), without graph.

    Args:
        function: (x, time) -> [B, ...], or (x, t, r) -> [B, ...] when `time` is (t, r).
        x: [B, ...] state.
        time: [B], or a tuple of them.
        dx: [B, ...] tangent of x.
        dtime: tangents of the times, shaped like them.
        method: "jvp" is torch.func.jvp, one call; "central" is `central_derivative` and a call for the value.
        step: for "central" only, which needs it.
        interval: for "central" only.

    Raises:
        ValueError: the method is unknown, shapes do not fit, or `central_derivative` raises.
    """
    times, dtimes = _checked(x, time, dx, dtime)
    if method == "jvp":
        if step is not None or interval is not None:
            raise ValueError("step and interval belong to method 'central'; leave them out for 'jvp'")
        with torch.no_grad(), _same_random_state(x):
            pair = torch.func.jvp(function, (x, *times), (dx.to(x.dtype), *dtimes))
        return ValueAndDerivative(pair[0].detach(), pair[1].detach())
    if method != "central":
        raise ValueError(f"method {method!r} is unknown; choose jvp or central")
    if step is None:
        raise ValueError("method 'central' needs a step, such as 5e-3 along the trajectory")
    derivative = central_derivative(function, x, times, dx, dtimes, step=step, interval=interval)
    with torch.no_grad(), _same_random_state(x):
        value = function(x, *times)
    return ValueAndDerivative(value.detach(), derivative)


@torch.no_grad()
def central_derivative(
    function: Function,
    x: Tensor,
    time: Times,
    dx: Tensor,
    dtime: Times,
    *,
    step: float,
    interval: tuple[float, float] | None = None,
) -> Tensor:
    """(function(+step) - function(-step)) / (2 step) along the tangents, [B, ...], in two calls.

    The error is O(step^2). A sample one of whose times would leave `interval` (both ends belong to it) takes a
    one-sided difference, with error O(step). `time` must be fp32 or fp64.

    Raises:
        ValueError: step is not positive; a sample cannot step to either side; or most samples give exactly the same
            value on both sides although a time moved (see also `_require_change`).
    """
    times, dtimes = _checked(x, time, dx, dtime)
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    forward, backward = _steps(times, dtimes, step, interval)
    after = _shifted(function, x, times, dx, dtimes, forward)
    before = _shifted(function, x, times, dx, dtimes, -backward)
    _require_change(after, before, _moved(times, dtimes, forward, backward), step)
    return (after - before) / _expand((forward + backward).to(after.dtype), after)


# Half of the difference that a derivative along a path is held against, in time, and the cosine that it must have.
PATH_STEP, LEAST_COSINE = 0.01, 0.9


class PathCheck(NamedTuple):
    """The derivative along a path against a difference over a stretch of it: mean cosine, and ratio of mean lengths."""

    cosine: float
    length: float

    @property
    def words(self) -> str:
        """For a log."""
        return (
            f"along the teacher's path its cosine with a difference over {2 * PATH_STEP:g} of time is "
            f"{self.cosine:.3f}, its length {self.length:.2f} of that"
        )

    def required(self, section: str) -> PathCheck:
        """Itself. Raises ValueError, which names settings of this section, where the derivative is not the path's."""
        if not self.cosine >= LEAST_COSINE:
            raise ValueError(
                f"the derivative along the teacher's path has a cosine of {self.cosine:.2f} with a difference over "
                f"{2 * PATH_STEP:g} of time ({LEAST_COSINE} is asked for) and {self.length:.1f} times its length: it "
                f"follows a wiggle of the network between the times of its training. Set {section}.time_smoothing to "
                f"0.01, or {section}.tangent to 'central' with a central_step of 0.02; {section}.check_tangent false "
                "trains it as it is. Under adapters on half-precision weights their rounding counts as well: check "
                "once with teacher.dtype float32"
            )
        return self


def path_check(function: Function, x: Tensor, times: tuple[Tensor, ...], dx: Tensor) -> PathCheck:
    """Compare the derivative at (x, times) along (dx, 1, 0, ...) with a difference of `PATH_STEP` to both sides.

    A derivative may be exact and yet say nothing of where the path leads: a network that is told 1000 t has a wiggle in
    time. Of the first time the path is straight, x + s dx. Raises ValueError as `total_derivative`.
    """
    moves = tuple(torch.ones_like(time) if place == 0 else torch.zeros_like(time) for place, time in enumerate(times))
    exact = total_derivative(function, x, times, dx, moves).derivative
    coarse = central_derivative(function, x, times, dx, moves, step=PATH_STEP)
    exact, coarse = exact.flatten(1).double(), coarse.flatten(1).double()
    cosine = torch.cosine_similarity(exact, coarse).mean()
    return PathCheck(cosine.item(), (exact.norm(dim=1).mean() / coarse.norm(dim=1).mean()).item())


def _checked(x: Tensor, time: Times, dx: Tensor, dtime: Times) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    times = time if isinstance(time, tuple) else (time,)
    dtimes = dtime if isinstance(dtime, tuple) else (dtime,)
    if dx.shape != x.shape:
        raise ValueError(f"the tangent of x must have its shape {tuple(x.shape)}, got {tuple(dx.shape)}")
    if [a.shape for a in times] != [a.shape for a in dtimes]:
        raise ValueError(
            f"each time needs a tangent of its shape, got times {[tuple(a.shape) for a in times]} and tangents "
            f"{[tuple(a.shape) for a in dtimes]}"
        )
    for value in times:
        if value.shape != x.shape[:1] or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"times must be [{x.shape[0]}] in fp32 or fp64, got {tuple(value.shape)} {value.dtype}")
    # Forward mode wants primal and tangent of one dtype.
    return times, tuple(tangent.to(value.dtype) for value, tangent in zip(times, dtimes, strict=True))


def _steps(
    times: tuple[Tensor, ...], dtimes: tuple[Tensor, ...], step: float, interval: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Lengths [B] of the steps to both sides, 0 where a time would leave the interval."""
    forward = torch.full_like(times[0], step)
    backward = torch.full_like(times[0], step)
    if interval is None:
        return forward, backward
    low, high = interval
    for value, tangent in zip(times, dtimes, strict=True):
        for steps, sign in ((forward, 1), (backward, -1)):
            end = value + sign * step * tangent
            # A time that stands still may lie anywhere.
            steps[(tangent != 0) & ((end < low) | (end > high))] = 0
    stuck = (forward + backward == 0).nonzero().flatten().tolist()
    if stuck:
        raise ValueError(
            f"samples {stuck} leave [{low}, {high}] on both sides with a step of {step}: take a smaller step, or times "
            "inside the interval"
        )
    return forward, backward


def _shifted(
    function: Function,
    x: Tensor,
    times: tuple[Tensor, ...],
    dx: Tensor,
    dtimes: tuple[Tensor, ...],
    steps: Tensor,
) -> Tensor:
    moved = (value + steps * tangent for value, tangent in zip(times, dtimes, strict=True))
    with _same_random_state(x):
        return function(x + _expand(steps.to(x.dtype), x) * dx, *moved)


def _moved(times: tuple[Tensor, ...], dtimes: tuple[Tensor, ...], forward: Tensor, backward: Tensor) -> Tensor:
    """bool [B]: some time differs between the two sides in its own precision."""
    moved = torch.zeros_like(forward, dtype=torch.bool)
    for value, tangent in zip(times, dtimes, strict=True):
        moved |= value + forward * tangent != value - backward * tangent
    return moved


def _require_change(after: Tensor, before: Tensor, moved: Tensor, step: float) -> None:
    # Most, not all: rounding lets the few samples through that lie next to a representable number.
    same = (after == before).flatten(1).all(dim=1) if after.ndim > 1 else after == before
    count, blind = int(moved.sum()), int((same & moved).sum())
    if 2 * blind > count:
        raise ValueError(
            f"{blind} of {count} samples give exactly the same value {step} before and after their time: the function "
            "does not see the step. The usual cause is a time in low precision (bf16 or fp16, or fp32 with a step near "
            "its resolution): keep the time and its embedding in fp32, or take a larger step."
        )


def _expand(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *([1] * (x.ndim - 1)))


@contextmanager
def _same_random_state(x: Tensor) -> Iterator[None]:
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def along(
    function: Function,
    x: Tensor,
    time: Times,
    dx: Tensor,
    dtime: Times,
    settings: TangentConfig,
    *,
    end: float = 1.0,
) -> Tensor:
    """The derivative along (dx, dtime), as configured; `end` is the largest time there is."""
    if settings.tangent == "jvp":
        return total_derivative(function, x, time, dx, dtime).derivative
    return central_derivative(function, x, time, dx, dtime, step=settings.central_step, interval=(0.0, end))
