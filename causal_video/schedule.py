"""The times at which each chunk is denoised, and which of them is the last one of a training rollout.

Times are rectified-flow times in (0, 1]; 1 is noise. Lists in thousandths of other projects are converted once, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.core.grids import shift_time, step_grid, validate_grid
from fewstep.core.randomness import shared_integer


@dataclass(frozen=True)
class StepSchedule:
    """Times per chunk; later chunks repeat the last entry. Chunk 0 usually gets more steps (Causal-rCM: [4, 2]).

    Attributes:
        times: for each chunk, strictly falling times in (0, 1].

    Raises:
        ValueError: no chunk, or times that are no grid.
    """

    times: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.times) == 0:
            raise ValueError("a schedule needs the times of at least one chunk")
        for times in self.times:
            validate_grid(times)
        object.__setattr__(self, "times", tuple(tuple(float(t) for t in times) for times in self.times))

    @classmethod
    def steps(cls, counts: Sequence[int], *, shift: float = 5.0) -> StepSchedule:
        """`step_grid` of each count: 4 steps at shift 5 are 1, 15/16, 5/6, 5/8; 2 are 1, 5/6.

        Raises:
            ValueError: a count below 1, or no counts.
        """
        return cls(tuple(step_grid(count, shift=shift) for count in counts))

    @classmethod
    def prefixes(cls, times: Sequence[float], counts: Sequence[int], *, shift: float = 1.0) -> StepSchedule:
        """The first `count` of one list for each chunk, warped by a shift.

        [1, 0.75, 0.5, 0.25] at shift 5 is the warped list of Self-Forcing (arXiv:2506.08009), 1000 to 250 there.

        Raises:
            ValueError: a count that the list does not have, or times that are no grid.
        """
        if len(counts) == 0 or min(counts) < 1 or max(counts) > len(times):
            raise ValueError(f"counts {list(counts)} must be from 1 to {len(times)}, the length of the list")
        warped = [shift_time(float(t), shift) for t in times]
        return cls(tuple(tuple(warped[:count]) for count in counts))

    def of(self, chunk: int) -> tuple[float, ...]:
        """The times of a chunk. Raises ValueError below 0."""
        if chunk < 0:
            raise ValueError(f"chunks are counted from 0, got {chunk}")
        return self.times[min(chunk, len(self.times) - 1)]

    @property
    def longest(self) -> int:
        """The most steps of a chunk."""
        return max(len(times) for times in self.times)

    def exits(self, exit_step: int, chunks: int, *, first: int = 0) -> tuple[int, ...]:
        """The step at which each chunk stops, `exit_step` or its last one: input of a rollout.

        Args:
            exit_step: 0 stops after the first call.
            chunks: number of chunks that are rolled out.
            first: the first of them.

        Raises:
            ValueError: an exit below 0 or beyond the longest list, or no chunks.
        """
        if not 0 <= exit_step < self.longest or chunks < 1:
            raise ValueError(
                f"exit_step must be from 0 to {self.longest - 1} and chunks at least 1, got {exit_step}, {chunks}"
            )
        return tuple(min(exit_step, len(self.of(chunk)) - 1) for chunk in range(first, first + chunks))


def random_exit(schedule: StepSchedule, seed: int, step: int) -> int:
    """A uniform exit step for one training step (Self-Forcing), the same in every process without a broadcast."""
    return shared_integer(seed, step, "rollout exit", schedule.longest)


def cycled_exit(schedule: StepSchedule, count: int) -> int:
    """The exit step of the `count`-th rollout of one phase: 0, 1, ..., longest - 1, 0, ... (Causal-rCM).

    Student and critic count their own rollouts. Raises ValueError below 0.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    return count % schedule.longest
