"""Is the forward-mode tangent of a function its derivative? Asked before a training run that rests on it.

Some mistakes are silent: a `torch.library.custom_op` reached by a dual tensor returns a zero tangent, a compiled region
that is called with dual tensors drops it, a `detach` ends it. Central differences see all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Relative errors that a right tangent stays below, with room: differences in fp32 reach 1e-4, along the time of a bf16
# network no better than 0.4.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 0.5}
LARGEST_STEP = 2.0**-3
HALVINGS = 13
# Romberg columns: an entry of column j has an error of order step^(2 j + 2).
COLUMNS = 5
CAUSES = (
    "Likely causes: a torch.library.custom_op without forward mode (it returns zeros), a compiled region called with "
    "dual tensors (it drops them), an autograd.Function with a wrong jvp, a detach in the path, a rounding of the "
    "input or a lookup by it. Check parts of the network to find the one, or take finite differences in training."
)


@dataclass(frozen=True)
class JvpCheck:
    """How a tangent compares with the central difference that agrees best, or if none does, with the surest one.

    Attributes:
        error: relative distance |tangent - difference| / max(|tangent|, |difference|), Euclidean norms.
        step: the smallest step in that difference; steps multiply the direction.
        uncertainty: the difference's own relative error, from its change between orders and steps.
        norm: Euclidean norm of the tangent.
    """

    error: float
    step: float
    uncertainty: float
    norm: float


class Float64Inside(TorchFunctionMode):
    """While it is active, casts to fp32 inside fp64 code are casts to fp64.

    diffusers networks compute time embeddings and some norms in fp32 whatever their weights are. That noise of 1e-7
    blurs differences of small steps. With fp64 weights and inputs under this mode the whole network is fp64, and
    `check_jvp` resolves 1e-8. Weights are not touched.
    """

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        widened = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **widened)


def widen(argument: Any) -> Any:
    """torch.float64 for torch.float32, anything else as it is."""
    return torch.float64 if argument is torch.float32 else argument


@torch.no_grad()
def check_jvp(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
    largest_step: float = LARGEST_STEP,
    halvings: int = HALVINGS,
) -> JvpCheck:
    """Compare `torch.func.jvp` of a function with central differences; use a small input.

    Differences of steps largest_step / 2^k are extrapolated to step 0 (Romberg), and of all orders and steps the one
    that agrees best counts: many numbers cannot agree with a wrong tangent by chance. The function is called
    2 halvings + 5 times, without gradients.

    Args:
        function: takes the primals, returns one tensor. It must give the same output each time.
        primals: floating tensors.
        tangents: the direction, shaped like the primals; None is zero.
        tolerance: largest relative error; None is 1e-6 in fp64, 1e-2 in fp32, 0.2 in fp16, 0.5 in bf16.
        dtype: what the function computes in, where that is narrower than the primals and its output.
        largest_step: times the direction; give one for which the function is still smooth and defined.
        halvings: number of halvings of the step, at least 1.

    Raises:
        ValueError: arguments do not fit together; the function has no forward mode, draws random numbers (dropout), or
            is not finite; its tangent is zero where the difference is not, or further than `tolerance` from it.
    """
    directions = checked_direction(primals, tangents)
    if halvings < 1 or not largest_step > 0:
        raise ValueError(f"halvings must be at least 1 and largest_step positive, got {halvings} and {largest_step}")
    base = output_of(function, primals)
    dtype = narrowest([base, *primals]) if dtype is None else dtype
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    noise = torch.finfo(dtype).eps
    check_repeatable(base, output_of(function, primals), "two calls with the same input", noise)
    output, tangent = forward_mode(function, primals, directions)
    check_repeatable(base, output, "a call with and a call without tangents", noise)
    if not bool(tangent.isfinite().all()):
        raise ValueError("the tangent is not finite: look for a division by zero or a square root at zero on the way")
    estimates = romberg(function, primals, directions, largest_step=largest_step, halvings=halvings)
    floor = 100 * noise * float(base.double().norm())
    result = compare(tangent.double(), estimates, tolerance=tolerance, floor=floor)
    if result.error > tolerance:
        raise ValueError(complaint(result, tolerance, dtype))
    return result


def checked_direction(primals: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> list[Tensor]:
    """Tangents with zeros for None. Raises ValueError unless they are floating and shaped like the primals."""
    if len(primals) != len(tangents) or not primals:
        raise ValueError(f"give one tangent or None per primal, got {len(tangents)} for {len(primals)} primals")
    directions = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(primals, tangents, strict=True)]
    for place, (x, dx) in enumerate(zip(primals, directions, strict=True)):
        if x.dtype not in TOLERANCES or dx.dtype != x.dtype or dx.shape != x.shape:
            raise ValueError(
                f"primal {place} is {x.dtype} of shape {tuple(x.shape)} and its tangent {dx.dtype} of shape "
                f"{tuple(dx.shape)}: both must be of one shape and of one of {', '.join(map(str, TOLERANCES))}"
            )
    if not any(bool(dx.any()) for dx in directions):
        raise ValueError("the direction is zero, and so is every tangent along it: give one that moves a primal")
    return directions


def narrowest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The floating dtype of the tensors with the largest rounding error."""
    dtypes = [x.dtype for x in tensors if x.dtype in TOLERANCES]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def output_of(function: Callable[..., Tensor], primals: Sequence[Tensor]) -> Tensor:
    """The function's output. Raises ValueError unless it is one finite floating tensor."""
    output = function(*primals)
    if not isinstance(output, Tensor) or output.dtype not in TOLERANCES:
        given = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the function must return one floating tensor, got {given}")
    if not bool(output.isfinite().all()):
        raise ValueError("the function's output is not finite at this input: check it at another one")
    return output


def check_repeatable(first: Tensor, second: Tensor, what: str, noise: float) -> None:
    """Raise ValueError when two outputs differ by more than reordered sums explain."""
    distance = relative_distance(first.double(), second.double())
    if distance > max(8 * noise, 1e-4):
        raise ValueError(
            f"{what} differ by {distance:.1e}: dropout or other random numbers in the function. Call eval() on the "
            "network, or draw the same numbers in each call: tangents of one dropout mask say nothing about another"
        )


def forward_mode(
    function: Callable[..., Tensor], primals: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Output and tangent. Raises ValueError when an operation has no forward mode."""
    try:
        output, tangent = torch.func.jvp(function, tuple(primals), tuple(directions))[:2]
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in ("forward ad", "forward mode", "forward-mode", "jvp")):
            raise
        first_line = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"the function has no forward mode: {first_line}. Send its attention through fewstep.kernels.attention "
            "(for diffusers networks, use_jvp_attention), replace the operation, or take finite differences in training"
        ) from error
    return output, torch.zeros_like(output) if tangent is None else tangent


@dataclass(frozen=True)
class Estimate:
    """A central difference, the smallest step in it, and the norm of its change against the entries it is made from."""

    value: Tensor
    step: float
    change: float


def romberg(
    function: Callable[..., Tensor],
    primals: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    largest_step: float,
    halvings: int,
) -> list[Estimate]:
    """All finite entries of the Romberg table of central differences, in fp64."""

    def moved(step: float) -> Tensor:
        places = [(x.double() + step * dx.double()).to(x.dtype) for x, dx in zip(primals, directions, strict=True)]
        return function(*places).double()

    estimates: list[Estimate] = []
    above: list[Tensor] = []
    for level in range(halvings + 1):
        step = largest_step / 2**level
        row = [(moved(step) - moved(-step)) / (2 * step)]
        for column in range(1, min(level, COLUMNS - 1) + 1):
            row.append(row[-1] + (row[-1] - above[column - 1]) / (4**column - 1))
        for column, value in enumerate(row):
            parents = [row[column - 1], above[column - 1]] if column else above[:1]
            change = max((float((value - parent).norm()) for parent in parents), default=math.inf)
            if bool(value.isfinite().all()):
                estimates.append(Estimate(value, step, change))
        above = row
    if not estimates:
        raise ValueError("the function is not finite around this input: give a smaller largest_step, or another input")
    return estimates


def compare(tangent: Tensor, estimates: Sequence[Estimate], *, tolerance: float, floor: float) -> JvpCheck:
    """The estimate that agrees best with the tangent; where none is within the tolerance, the one that is surest.

    Args:
        tangent: fp64.
        estimates: see `romberg`.
        tolerance: largest relative error that counts as agreement.
        floor: differences of outputs below this norm are rounding.
    """
    norm = float(tangent.norm())
    best = min(estimates, key=lambda estimate: relative_distance(tangent, estimate.value))
    if norm == 0 or relative_distance(tangent, best.value) > tolerance:
        best = min(estimates, key=lambda estimate: estimate.change)
    size = float(best.value.norm())
    if norm == 0 and size * best.step <= floor:
        return JvpCheck(error=0.0, step=best.step, uncertainty=0.0, norm=0.0)
    return JvpCheck(
        error=relative_distance(tangent, best.value),
        step=best.step,
        uncertainty=best.change / size if size > 0 else math.inf,
        norm=norm,
    )


def relative_distance(first: Tensor, second: Tensor) -> float:
    """|a - b| / max(|a|, |b|), 0 for two zeros."""
    size = max(float(first.norm()), float(second.norm()))
    return float((first - second).norm()) / size if size > 0 else 0.0


def complaint(result: JvpCheck, tolerance: float, dtype: torch.dtype) -> str:
    """What to tell somebody whose tangent is wrong."""
    if result.norm == 0:
        return f"the tangent is zero and the central difference (step {result.step:.1e}) is not. {CAUSES}"
    found = (
        f"the tangent is {result.error:.1e} away from the central difference (step {result.step:.1e}, itself known to "
        f"{result.uncertainty:.1e}), more than {tolerance:.1e}. "
    )
    if torch.finfo(dtype).bits < 32:
        found += f"Differences are coarse in {dtype}: check a copy of the network in float32. "
    elif result.uncertainty > tolerance:
        found += "The difference is too uncertain to judge: take a smaller largest_step, or float64 and Float64Inside. "
    return found + CAUSES
