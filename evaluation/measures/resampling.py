"""Intervals by the bootstrap: which rows a repetition of the measurement would have had.

A repetition draws as many images and as many reference pictures again, with replacement. All systems of one evaluation
share the draws, so a difference is resampled in pairs: image i of one with image i of the other, and both against the
same reference pictures. What belongs together is drawn together (all images of a prompt), and what was balanced by
design is drawn within its kind (all pictures of a digit).

Shapes: N rows, rows [N] integers, replicates [R] (one value per repetition).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CONFIDENCE = 0.95
NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Population:
    """Rows of a set and how they came about.

    `strata` [N]: the count of each value was fixed, and rows are drawn again within it. `clusters` [N]: rows of one
    value came together (one prompt), and whole clusters are drawn again. Neither: rows are independent.
    Raises ValueError for both, for another length, and for fewer than two rows or clusters.
    """

    size: int
    strata: Tensor | None = None
    clusters: Tensor | None = None

    def __post_init__(self) -> None:
        if self.strata is not None and self.clusters is not None:
            raise ValueError("strata and clusters exclude each other; give the one by which the rows were drawn")
        for kind in (self.strata, self.clusters):
            if kind is not None and len(kind) != self.size:
                raise ValueError(f"{len(kind)} labels for {self.size} rows; give one per row")
        if self.size < 2 or (self.clusters is not None and len(self.clusters.unique()) < 2):
            raise ValueError("an interval needs at least two rows, and two prompts where it is over prompts")

    @classmethod
    def of_prompts(cls, prompts: Sequence[str]) -> Population:
        """Images of these prompts: those of one prompt are drawn together, all alone where no prompt comes twice."""
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        if len(numbers) in (1, len(prompts)):
            # One prompt alone says nothing about others: the interval is over images of that prompt.
            return cls(len(prompts))
        return cls(len(prompts), clusters=torch.tensor([numbers[prompt] for prompt in prompts]))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Rows of one repetition, as many as there are (about as many where clusters differ in size)."""
        if self.strata is not None:
            rows = torch.empty(self.size, dtype=torch.int64)
            for label in self.strata.unique():
                mine = (self.strata == label).nonzero()[:, 0]
                rows[mine] = mine[torch.randint(len(mine), (len(mine),), generator=generator)]
            return rows
        if self.clusters is None:
            return torch.randint(self.size, (self.size,), generator=generator)
        order = self.clusters.argsort(stable=True)
        parts = order.split(self.clusters.unique(return_counts=True)[1].tolist())
        chosen = torch.randint(len(parts), (len(parts),), generator=generator)
        return torch.cat([parts[number] for number in chosen.tolist()])

    def variance_of_mean(self, values: Tensor) -> float:
        """The variance that the mean of one number per row [N] has over draws of the population, in closed form."""
        centred = values.double().cpu() - values.double().mean().cpu()
        if self.strata is not None:
            found = 0.0
            for label in self.strata.unique():
                own = centred[self.strata == label]
                found += (own - own.mean()).square().sum().item() / self.size**2
            return found
        if self.clusters is None:
            return centred.square().sum().item() / self.size**2
        totals = torch.zeros(int(self.clusters.max()) + 1, dtype=torch.float64).index_add(0, self.clusters, centred)
        return totals.square().sum().item() / self.size**2


@dataclass(frozen=True)
class Draws:
    """The repetitions of one evaluation: rows of images and of reference pictures, the same for each system."""

    images: Population
    references: Population | None
    count: int
    seed: int = 0

    def image_rows(self, number: int) -> Tensor:
        """Rows of the images in repetition `number`."""
        return self.images.draw(self._generator(number, 0))

    def reference_rows(self, number: int) -> Tensor | None:
        """Rows of the reference pictures, which do not depend on those of the images; None without pictures."""
        return None if self.references is None else self.references.draw(self._generator(number, 1))

    def image_counts(self) -> Tensor:
        """[R, N]: how often each image occurs in each repetition, float64."""
        return self._counts([self.image_rows(number) for number in range(self.count)], self.images.size)

    def reference_counts(self) -> Tensor:
        """[R, M]: the same of the reference pictures; all once where there are no pictures to draw."""
        assert self.references is not None, "there are reference pictures where their counts are asked for"
        rows = [self.references.draw(self._generator(number, 1)) for number in range(self.count)]
        return self._counts(rows, self.references.size)

    def _generator(self, number: int, side: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) * 2 + side)

    @staticmethod
    def _counts(rows: list[Tensor], size: int) -> Tensor:
        return torch.stack([torch.bincount(one, minlength=size) for one in rows]).double()


@dataclass(frozen=True)
class Interval:
    """Where the expected value of a figure at these counts of images lies with 95 % confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class Error:
    """What the error of a figure is made of: its values in repetitions, or of a distance the influence of each row.

    `replicates` [R] are the values. `of_images` [N] and `of_references` [M] say how much each row moves a distance (N
    times the derivative in the row's weight), with the populations that the rows are drawn from.
    """

    replicates: Tensor | None = None
    of_images: Tensor | None = None
    of_references: Tensor | None = None
    images: Population | None = None
    references: Population | None = None

    @classmethod
    def of_distance(cls, rows: tuple[Tensor, Tensor | None], draws: Draws) -> Error:
        """That of a distance with the influences of its images, and of reference pictures where they are known."""
        return cls(None, rows[0], rows[1], draws.images, draws.references)

    def variance(self) -> float:
        """The variance of the figure over samples of these sizes.

        Of a mean it is that of the repetitions. Of a distance it is that of its linear part, which the influences give
        in closed form as infinitely many repetitions would (the infinitesimal jackknife, Efron 1982, chapter 6).
        Repetitions of the distance itself have three times the variance where two sets are of one law: they start from
        the measured distance, which is already too far apart. There the linear part has twice the variance, and
        elsewhere the right one, as simulated (scripts/studies/interval_coverage.py).

        Raises ValueError for fewer than two repetitions.
        """
        if self.of_images is not None and self.images is not None:
            found = self.images.variance_of_mean(self.of_images)
            if self.of_references is not None and self.references is not None:
                found += self.references.variance_of_mean(self.of_references)
            return found
        if self.replicates is None or len(self.replicates) < 2:
            count = 0 if self.replicates is None else len(self.replicates)
            raise ValueError(f"{count} repetitions; an interval needs at least 2")
        if not bool(self.replicates.isfinite().all()):
            raise ValueError("a repetition is not a finite number: a measure is broken for the rows that it drew")
        return self.replicates.double().var().item()

    @classmethod
    def of_difference(cls, first: Sequence[Error], second: Sequence[Error]) -> Error:
        """That of the mean over `first` minus the mean over `second`, from the same draws of the same rows."""
        one, other = cls.of_mean(first), cls.of_mean(second)

        def minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else a - b

        return cls(
            minus(one.replicates, other.replicates),
            minus(one.of_images, other.of_images),
            minus(one.of_references, other.of_references),
            one.images,
            one.references,
        )

    @classmethod
    def of_mean(cls, errors: Sequence[Error]) -> Error:
        """That of the mean of figures of the same draws."""

        def mean(parts: Sequence[Tensor | None]) -> Tensor | None:
            known = [part for part in parts if part is not None]
            return torch.stack(known).mean(dim=0) if len(known) == len(errors) else None

        return cls(
            mean([one.replicates for one in errors]),
            mean([one.of_images for one in errors]),
            mean([one.of_references for one in errors]),
            errors[0].images,
            errors[0].references,
        )


def interval_of(value: float, error: Error, *, low: float = -math.inf, high: float = math.inf) -> Interval:
    """Value -+ 1.96 standard errors, cut to the range of the measure.

    The repetitions give the spread and not the place: drawing with replacement moves distances upwards, which would
    count their bias twice.
    """
    half = NORMAL.inv_cdf(0.5 + CONFIDENCE / 2) * math.sqrt(error.variance())
    return Interval(max(low, value - half), min(high, value + half))


def proportion_interval(value: float, error: Error, *, samples: int) -> Interval:
    """Wilson's interval of a share in [0, 1], of as many independent images as explain the spread of the repetitions.

    It does not shrink to a point where all images are right. Source: Wilson 1927, JASA 22, Eq. 2.
    """
    variance = error.variance()
    effective = samples if variance == 0.0 else min(samples, max(1.0, value * (1.0 - value) / variance))
    z = NORMAL.inv_cdf(0.5 + CONFIDENCE / 2)
    centre = (value + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(value * (1 - value) / effective + z * z / (4 * effective**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class Difference:
    """One row minus another in one measure, with its interval; `decided` tells that the interval leaves out 0."""

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        return not self.low <= 0.0 <= self.high


def paired_difference(
    first: Sequence[float], second: Sequence[float], errors: tuple[Sequence[Error], Sequence[Error]]
) -> Difference:
    """Mean of `first` minus mean of `second`, each with one value, and one error, per training run.

    The variance of the difference of the means over draws is that of images, references and prompts; runs of several
    seeds add that of training, s1^2 / k1 + s2^2 / k2, with Student's factor at Welch's degrees of freedom (Welch 1947,
    Biometrika 34), of which the drawn part counts as known. One run each says something of these two students and
    nothing of their methods.
    """
    value = statistics.fmean(first) - statistics.fmean(second)
    measured = Error.of_difference(*errors).variance()
    parts = [
        (statistics.variance(values) / len(values), len(values) - 1) for values in (first, second) if len(values) > 1
    ]
    total = measured + sum(variance for variance, _ in parts)
    spread = sum(variance**2 / freedom for variance, freedom in parts)
    factor = _student_factor(total**2 / spread) if spread > 0.0 else NORMAL.inv_cdf(0.5 + CONFIDENCE / 2)
    half = factor * math.sqrt(total)
    return Difference(value, value - half, value + half)


def _student_factor(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))
