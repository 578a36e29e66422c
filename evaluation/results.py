"""What an evaluation found, as plain data that turns into JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.evaluation.accuracy import AccuracyResult, DiversityResult
from fewstep.evaluation.clip_score import ClipResult
from fewstep.evaluation.fid import FidResult, KidResult
from fewstep.evaluation.latency import LatencyResult


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of one pipeline at one step count with one seed; None stands for what the judge cannot tell."""

    name: str
    steps: int
    guidance: float
    seed: int
    samples: int
    fid: FidResult
    kid: KidResult
    accuracy: AccuracyResult | None
    diversity: DiversityResult | None
    clip: ClipResult | None = None


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `count` values, one per seed."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        if len(values) == 0:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(values), min(values), max(values), len(values))


def _spread_of_known(results: Sequence[AccuracyResult | DiversityResult | ClipResult | None]) -> Spread | None:
    values = [result.value for result in results if result is not None]
    return Spread.of(values) if values else None


@dataclass(frozen=True)
class ReportRow:
    """One system at one step count: one result per seed, and its speed, which has no seed."""

    name: str
    steps: int
    guidance: float
    results: tuple[EvaluationResult, ...]
    latency: LatencyResult | None = None

    def fid(self) -> Spread:
        return Spread.of([result.fid.value for result in self.results])

    def floor(self) -> Spread:
        return Spread.of([result.fid.floor for result in self.results])

    def kid(self) -> Spread:
        return Spread.of([result.kid.value for result in self.results])

    def kid_floor(self) -> Spread:
        return Spread.of([result.kid.floor for result in self.results])

    def accuracy(self) -> Spread | None:
        return _spread_of_known([result.accuracy for result in self.results])

    def diversity(self) -> Spread | None:
        return _spread_of_known([result.diversity for result in self.results])

    def clip(self) -> Spread | None:
        return _spread_of_known([result.clip for result in self.results])

    def guidance_text(self) -> str:
        """What follows a name where there is guidance."""
        return "" if self.guidance == 1.0 else f", guidance {self.guidance:g}"

    def label(self) -> str:
        """Name, step count and guidance, for grids."""
        return f"{self.name}, {self.steps} step{'' if self.steps == 1 else 's'}{self.guidance_text()}"
