"""What an evaluation found, as plain data that turns into JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from fewstep.evaluation.latency import LatencyResult
from fewstep.evaluation.measures.resampling import Difference, Error, paired_difference

# Below this many images distances of large features are for trying things out: their bias is as large as they are.
FEW_IMAGES = 2000


@dataclass(frozen=True)
class MeasureKind:
    """How a figure is shown: its title, digits behind the point, factor of the printed number, and which end is good.

    `lower_is_better` None means that neither end is.
    """

    key: str
    title: str
    digits: int = 2
    scale: float = 1.0
    lower_is_better: bool | None = True


@dataclass(frozen=True)
class Measured:
    """A figure with what it takes to read it.

    [low, high] is the 95 % interval of its expected value at these counts, None where it was not asked for or cannot be
    had. `floor` is the same figure for real pictures in place of generated ones; `source` names features, protocol or
    weights; `warnings` say what a reader must know before believing it.
    """

    value: float
    low: float | None
    high: float | None
    samples: int
    source: str
    references: int | None = None
    floor: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """Images from best to worst [N], and by what."""

    order: tuple[int, ...]
    by: str


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of one pipeline at one step count with one seed, by key, and the errors behind the intervals."""

    name: str
    steps: int
    guidance: float
    seed: int
    samples: int
    figures: dict[str, Measured]
    errors: dict[str, Error] = field(default_factory=dict, repr=False)
    ranking: Ranking | None = None
    run: str = ""

    def value(self, key: str) -> float:
        """The figure of that key. Raises ValueError when it was not measured."""
        if key not in self.figures:
            raise ValueError(f"{self.name} has no {key}; measured are {', '.join(self.figures)}")
        return self.figures[key].value


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `count` values, one per training run or seed."""

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


@dataclass(frozen=True)
class ReportRow:
    """One system at one step count: one result per training run and seed, and its speed, which has no seed.

    `call` says what else it is called with, such as a grid of its own; it is part of what tells rows apart.
    """

    name: str
    steps: int
    guidance: float
    results: tuple[EvaluationResult, ...]
    latency: LatencyResult | None = None
    call: str = ""

    def spread(self, key: str) -> Spread | None:
        """Over the results, or None where the measure is missing."""
        values = [result.figures[key].value for result in self.results if key in result.figures]
        return Spread.of(values) if values else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """The interval of the figure of a single result; several results are compared by `difference`."""
        if len(self.results) != 1 or key not in self.results[0].figures:
            return None
        one = self.results[0].figures[key]
        return None if one.low is None or one.high is None else (one.low, one.high)

    def difference(self, other: ReportRow, key: str) -> Difference | None:
        """This row minus `other`, in pairs; None where either lacks the measure or its repetitions, or where they have
        other numbers of images."""
        sides = [[result.errors[key] for result in row.results if key in result.errors] for row in (self, other)]
        counts = {
            result.figures[key].samples for row in (self, other) for result in row.results if key in result.errors
        }
        if any(len(found) != len(row.results) for found, row in zip(sides, (self, other), strict=True)):
            return None
        if len(counts) != 1:
            return None
        (values, errors), (others, other_errors) = (row._by_run(key) for row in (self, other))
        return paired_difference(values, others, (errors, other_errors))

    def _by_run(self, key: str) -> tuple[list[float], list[Error]]:
        """The mean of the figure over the seeds of each training run, and its error."""
        runs: dict[str, list[EvaluationResult]] = {}
        for result in self.results:
            runs.setdefault(result.run, []).append(result)
        values = [statistics.fmean(one.figures[key].value for one in own) for own in runs.values()]
        return values, [Error.of_mean([one.errors[key] for one in own]) for own in runs.values()]

    def guidance_text(self) -> str:
        """What follows a name where there is guidance or a call of its own."""
        guided = "" if self.guidance == 1.0 else f", guidance {self.guidance:g}"
        return guided + (f", {self.call}" if self.call else "")

    def label(self) -> str:
        """Name, step count, guidance and call, for grids."""
        return f"{self.name}, {self.steps} step{'' if self.steps == 1 else 's'}{self.guidance_text()}"
