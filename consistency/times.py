"""Random times of the losses, as functions of uniform or normal numbers; pairs (t, r) for flow maps.

Times are canonical, t in [0, 1] with noise at 1, shape [B]; angles are named tau. `core/grids.py` has the shift
(`shift_time`) and the grids (`step_grid`), `core/randomness.py` draws the numbers. fp32 at least, fp64
where an input is fp64. Shares say which part of the samples in expectation, except in `anyflow_times`, which counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.grids import shift_time, step_grid
from fewstep.core.paths import at_least_fp32


@dataclass(frozen=True, eq=False)
class TimePair:
    """A flow map goes from t to r, 0 <= r <= t <= 1, both [B]."""

    t: Tensor
    r: Tensor

    @property
    def equal(self) -> Tensor:
        """bool [B]: the samples with r = t, on which a flow-map loss is flow matching."""
        return self.t == self.r


def lognormal_tan(normal: Tensor, *, mean: float, std: float, sigma_data: float = 1.0) -> Tensor:
    """tau = atan(exp(mean + std normal) / sigma_data) in (0, pi/2) (sCM, arXiv:2410.11081; EDM's law of sigma).

    The canonical time of it is `logit_normal` with the same mean and std, whatever sigma_data is.

    Raises:
        ValueError: std or sigma_data is not positive.
    """
    _require_positive(std=std, sigma_data=sigma_data)
    return torch.atan(torch.exp(mean + std * at_least_fp32(normal)) / sigma_data)


def logit_normal(normal: Tensor, *, mean: float, std: float) -> Tensor:
    """t = sigmoid(mean + std normal) (SD3, arXiv:2403.03206).

    Raises:
        ValueError: std is not positive.
    """
    _require_positive(std=std)
    return torch.sigmoid(mean + std * at_least_fp32(normal))


def grid_times(uniform: Tensor, *, steps: int, shift: float = 1.0, skip: int = 1) -> TimePair:
    """A random time of `step_grid(steps, shift)` and the one `skip` steps nearer to the data, at most 0.

    uniform is [B] in [0, 1); each of the `steps` times has the same probability.

    Raises:
        ValueError: skip is not from 1 to steps, or the grid does not exist.
    """
    if not 1 <= skip <= steps:
        raise ValueError(f"skip must be from 1 to the {steps} steps of the grid, got {skip}")
    uniform = at_least_fp32(uniform)
    grid = torch.tensor((*step_grid(steps, shift=shift), 0.0), dtype=uniform.dtype, device=uniform.device)
    # fp32 rounds u * steps up to steps for u next to 1.
    index = (uniform * steps).long().clamp(0, steps - 1)
    return TimePair(grid[index], grid[(index + skip).clamp(max=steps)])


def skipped_times(uniform: Tensor, *, skip: float, shift: float = 1.0) -> TimePair:
    """Continuous times of discrete consistency: t of u in (0, 1], r of max(u - skip, 0), both shifted.

    As we read the continuous times of Causal-rCM's code (arXiv:2606.25473); the grid of `grid_times` has the same steps
    at its own times alone. u is 1 - `uniform`, so that t = 1 is drawn.

    Raises:
        ValueError: skip is not in (0, 1), or the shift is not positive.
    """
    if not 0 < skip < 1:
        raise ValueError(f"skip must lie in (0, 1), got {skip}")
    u = 1 - at_least_fp32(uniform)
    return TimePair(shift_time(u, shift), shift_time((u - skip).clamp(min=0.0), shift))


def mix_max_time(time: Tensor, uniform: Tensor, *, share: float, maximum: float = 1.0) -> Tensor:
    """`maximum` where uniform < share, else `time`, all [B] (SANA-Sprint, arXiv:2503.09641: share 0.5).

    `maximum` is pi/2 for angles, or the student's first time when that is below 1.

    Raises:
        ValueError: share is not in [0, 1], or the shapes differ.
    """
    _require_share(share)
    if time.shape != uniform.shape:
        raise ValueError(f"time {tuple(time.shape)} and uniform {tuple(uniform.shape)} must have one shape")
    time = at_least_fp32(time)
    return torch.where(uniform < share, torch.full_like(time, maximum), time)


def ordered_times(first: Tensor, second: Tensor, uniform: Tensor, *, equal_share: float) -> TimePair:
    """t = max, r = min of two times; where uniform < equal_share, r = t (MeanFlow, arXiv:2505.13447).

    MeanFlow has both logit-normal(-0.4, 1.0) with an equal share of 0.75, improved MeanFlow of 0.5. Public
    implementations differ in whether their ratio counts the equal or the unequal pairs; this one counts the equal.

    Raises:
        ValueError: equal_share is not in [0, 1].
    """
    _require_share(equal_share)
    first, second = at_least_fp32(first), at_least_fp32(second)
    t = torch.maximum(first, second)
    return TimePair(t, torch.where(uniform < equal_share, t, torch.minimum(first, second)))


def anyflow_times(first: Tensor, second: Tensor, indices: Tensor, *, shift: float = 5.0) -> TimePair:
    """AnyFlow's batch (arXiv:2605.13724): of four samples two have r = t, one has r = 0, one has r free.

    t and r are maximum and minimum of two uniform numbers [B], then shifted. `indices` [B] are the global sample
    indices: index mod 4 decides, so each four consecutive samples hold the exact shares on any number of processes
    (the public code splits the batch by rank; splitting by index is ours).

    Raises:
        ValueError: indices are not integers [B], or the shift is not positive.
    """
    if indices.dtype.is_floating_point or indices.dtype == torch.bool or indices.shape != first.shape:
        raise ValueError(
            f"indices must be integers of shape {tuple(first.shape)}, got {indices.dtype} {tuple(indices.shape)}"
        )
    first, second = at_least_fp32(first), at_least_fp32(second)
    t = shift_time(torch.maximum(first, second), shift)
    r = shift_time(torch.minimum(first, second), shift)
    part = indices.to(t.device) % 4
    r = torch.where(part < 2, t, r)
    return TimePair(t, torch.where(part == 2, torch.zeros_like(r), r))


def ect_times(t: Tensor, *, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> TimePair:
    """ECT's r for t (arXiv:2406.14548), stated there for sigma = t / (1 - t) and converted here.

    sigma_r = sigma_t max(0, 1 - (1 + k sigmoid(-b sigma_t)) / q^(stage + 1)). Early stages clamp small times to r = 0,
    which is plain denoising; r approaches t as the stage grows. At t = 1, where sigma is infinite, r = 1: draw below 1.

    Raises:
        ValueError: stage is negative, or q is not above 1.
    """
    if stage < 0 or not q > 1:
        raise ValueError(f"stage must be 0 or more and q above 1, got stage {stage} and q {q}")
    t = at_least_fp32(t)
    gap = (1 + k * torch.sigmoid(-b * t / (1 - t))) / q ** (stage + 1)
    ratio = (1 - gap).clamp(min=0)
    return TimePair(t, ratio * t / (ratio * t + (1 - t)))


def _require_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"a share must lie in [0, 1], got {share}")


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")
