from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from fewstep.core.grids import validate_grid
from fewstep.core.run_settings import Sampler


@dataclass(frozen=True)
class SamplerSpec:
    """How a student samples.

    times: canonical times of the steps, strictly descending in (0, 1], without the final 0.
    sampler: "sde" re-noises the predicted x0 at the next time, "ode" takes an Euler step along the velocity, "flow_map"
        one along the average velocity of a network of two times.
    shift: of the grid, for a scheduler that makes the grids of other step counts too; None is what the times say, which
        is 1 for one step.
    Raises ValueError for another order, range or name.
    """

    times: tuple[float, ...]
    sampler: Sampler
    shift: float | None = None

    def __post_init__(self) -> None:
        validate_grid(self.times)
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler is {self.sampler!r}, allowed are {', '.join(get_args(Sampler))}.")

    @property
    def steps(self) -> int:
        return len(self.times)
