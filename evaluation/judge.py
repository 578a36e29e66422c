"""From samples to figures: what is read of them once, and every measure of it with its interval.

Shapes: N images, pixels [B, 3, H, W] in [0, 1], features [N, D], scores [N], replicates [R].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.evaluation.accuracy import PairDistances
from fewstep.evaluation.measures.frechet import (
    LEAST_OF_LINE,
    distance_at_infinity,
    distance_influences,
)
from fewstep.evaluation.measures.kernel import (
    clip_maximum_mean_discrepancy,
    cmmd_influences,
    kernel_inception_distance,
    kid_influences,
)
from fewstep.evaluation.measures.neighbours import density_coverage, nearest_distance, precision_recall
from fewstep.evaluation.measures.resampling import Draws, Error, Population, interval_of, proportion_interval
from fewstep.evaluation.measures.statistics import FeatureStatistics, feature_distance
from fewstep.evaluation.references import Reference, ReferenceFeatures
from fewstep.evaluation.results import FEW_IMAGES, EvaluationResult, Measured, MeasureKind, Ranking
from fewstep.evaluation.scorers.scorer import Scorer, score
from fewstep.evaluation.systems import System

# What may be asked for by name, the figures that each gives, and the features that it needs.
KINDS = {
    "fid": (MeasureKind("fid", "FID"),),
    "kid": (MeasureKind("kid", "KID", digits=4),),
    "prc": (
        MeasureKind("precision", "precision", digits=3, lower_is_better=False),
        MeasureKind("recall", "recall", digits=3, lower_is_better=False),
    ),
    "dc": (
        MeasureKind("density", "density", digits=3, lower_is_better=False),
        MeasureKind("coverage", "coverage", digits=3, lower_is_better=False),
    ),
    "fid_inf": (MeasureKind("fid_inf", "FID-infinity"),),
    "fd_dinov2": (MeasureKind("fd_dinov2", "FD-DINOv2"),),
    "cmmd": (MeasureKind("cmmd", "CMMD", digits=3),),
    "classes": (
        MeasureKind("accuracy", "accuracy %", digits=1, scale=100.0, lower_is_better=False),
        MeasureKind("diversity", "diversity", lower_is_better=None),
    ),
}
FEATURES = {
    "fd_dinov2": "dinov2",
    "cmmd": "clip_vision",
    **dict.fromkeys(("fid", "kid", "prc", "dc", "fid_inf"), "image"),
}
# These go by moments alone, so a file of statistics is enough.
BY_STATISTICS = ("fid", "fd_dinov2", "fid_inf")
NEVER_NEGATIVE = (*BY_STATISTICS[:2], "cmmd")
SHARES_OF_REFERENCES = ("recall", "coverage")
SHARES = ("accuracy", "precision", *SHARES_OF_REFERENCES)
# A line through fifteen distances costs as much as fifteen, so its repetitions are fewer.
LINE_REPETITIONS = 50


@dataclass(frozen=True)
class Judge:
    """What generated images are held against, which measures are taken, and how their intervals are drawn.

    `metrics` are keys of `KINDS`; `scorers` add one measure each. `repetitions` 0 leaves intervals out. Raises
    ValueError for an unknown metric and for one whose features or classes are missing.
    """

    reference: Reference
    metrics: tuple[str, ...]
    scorers: tuple[Scorer, ...] = ()
    repetitions: int = 200
    seed: int = 0
    chunk: int = 32

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in KINDS:
                raise ValueError(f"metric {metric!r} is unknown; known are {', '.join(KINDS)}, and names of scorers")
            if metric == "classes" and self.reference.classes is None:
                raise ValueError("metric 'classes' needs a classifier, which only the embedded worlds have")
            if metric in FEATURES:
                self._require(metric)
        if self.repetitions == 1 or self.repetitions < 0:
            raise ValueError(f"repetitions is {self.repetitions}; use 0 for no intervals, or at least 2 (200 is usual)")

    def _require(self, metric: str) -> None:
        real = self.reference.real.get(FEATURES[metric])
        if real is None:
            raise ValueError(f"metric {metric!r} needs real pictures and the weights of its features")
        if real.features is None and metric not in BY_STATISTICS:
            raise ValueError(f"metric {metric!r} needs pictures; {real.name} holds their mean and covariance alone")

    def require_samples(self, count: int) -> None:
        """Raises ValueError when a metric needs more images than that."""
        if "fid_inf" in self.metrics and count < LEAST_OF_LINE:
            raise ValueError(
                f"metric 'fid_inf' needs at least {LEAST_OF_LINE} images, and thousands to be read; got {count}"
            )

    def kinds(self) -> tuple[MeasureKind, ...]:
        """All figures of a result, in the order in which they are shown."""
        named = tuple(kind for metric in self.metrics for kind in KINDS[metric])
        return named + tuple(
            MeasureKind(one.card.name, _title(one), digits=3, lower_is_better=not one.card.higher_is_better)
            for one in self.scorers
        )


def _title(scorer: Scorer) -> str:
    return {"clip_score": "CLIP score"}.get(scorer.card.name, scorer.card.name)


@dataclass
class Material:
    """What is kept of the samples: features by extractor, scores by scorer, and which are of their class."""

    prompts: list[str]
    features: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    right: Tensor | None = None


@torch.no_grad()
def score_batches(
    judge: Judge, prompts: Sequence[str], batches: Iterable[list[Tensor]], *, device: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Scores [N] by scorer, and [N] of right and wrong where there are classes, of pictures that come in batches."""
    classes = judge.reference.classes if "classes" in judge.metrics else None
    labels = None if classes is None else classes.labels(prompts)
    scores: dict[str, list[Tensor]] = {one.card.name: [] for one in judge.scorers}
    right, start = [], 0
    for batch in batches:
        texts = list(prompts[start : start + len(batch)])
        pixels = torch.stack(batch)
        for one in judge.scorers:
            values = score(one, pixels.to(device), texts, chunk=judge.chunk)
            scores[one.card.name].append(values.double().cpu())
        if classes is not None and labels is not None:
            right.append(classes.right(pixels, labels[start : start + len(batch)]))
        start += len(batch)
    if start != len(prompts):
        raise ValueError(f"{start} pictures for {len(prompts)} prompts; give one prompt per picture")
    return {name: torch.cat(values) for name, values in scores.items()}, torch.cat(right) if right else None


def judge_material(judge: Judge, material: Material, *, system: System, seed: int) -> EvaluationResult:
    """All figures of one set of samples. `seed` is the one they were drawn with."""
    figures, errors = _Figures(judge, material, seed=seed).all()
    head = (system.name, system.steps, system.guidance, seed, len(material.prompts))
    return EvaluationResult(*head, figures, errors, rank_images(judge, material), system.path)


def rank_images(judge: Judge, material: Material) -> Ranking | None:
    """Images by the first scorer, else by the distance of their features to the nearest real picture; None without."""
    if judge.scorers:
        card = judge.scorers[0].card
        order = material.scores[card.name].argsort(descending=card.higher_is_better, stable=True)
        return Ranking(tuple(order.tolist()), card.name)
    real = judge.reference.real.get("image")
    if real is None or real.features is None or "image" not in material.features:
        return None
    order = nearest_distance(material.features["image"], real.features).argsort(stable=True)
    return Ranking(tuple(order.tolist()), "distance to the nearest real picture")


class _Figures:
    """The measures of one set of samples, one method each."""

    def __init__(self, judge: Judge, material: Material, *, seed: int) -> None:
        self.judge, self.material, self.seed = judge, material, seed
        self.figures: dict[str, Measured] = {}
        self.errors: dict[str, Error] = {}
        classes = judge.reference.classes
        self.labels = None if classes is None else classes.labels(material.prompts)
        count = len(material.prompts)
        self.images = (
            Population.of_prompts(material.prompts) if self.labels is None else Population(count, strata=self.labels)
        )

    def all(self) -> tuple[dict[str, Measured], dict[str, Error]]:
        makers: dict[str, Callable[[], None]] = {
            "kid": self.kid,
            "prc": lambda: self.neighbours("precision", "recall"),
            "dc": lambda: self.neighbours("density", "coverage"),
            "fid_inf": self.at_infinity,
            "cmmd": self.cmmd,
            "classes": self.classes,
        }
        for metric in self.judge.metrics:
            if metric in ("fid", "fd_dinov2"):
                self.frechet(metric)
            else:
                makers[metric]()
        for one in self.judge.scorers:
            self.mean(one.card.name, self.material.scores[one.card.name], source=one.card.weights or one.card.name)
        return self.figures, self.errors

    def draws(self, real: ReferenceFeatures | None, count: int | None = None) -> Draws:
        pictures = None
        if real is not None and real.features is not None:
            pictures = Population(len(real.features), strata=real.labels)
        return Draws(self.images, pictures, self.judge.repetitions if count is None else count, self.judge.seed)

    def error(self, real: ReferenceFeatures, rows: tuple[Tensor, Tensor | None]) -> Error:
        """That of a distance, from the influence of each row."""
        return Error.of_distance(rows, self.draws(real))

    def pair(self, metric: str) -> tuple[Tensor, ReferenceFeatures]:
        key = FEATURES[metric]
        return self.material.features[key], self.judge.reference.real[key]

    def strata(self, real: ReferenceFeatures) -> tuple[Tensor, Tensor] | None:
        return None if self.labels is None or real.labels is None else (self.labels, real.labels)

    def floor(self, real: ReferenceFeatures, measure: Callable[[Tensor, Tensor], float]) -> float | None:
        rows = real.floor_rows(len(self.material.prompts), seed=self.seed)
        if rows is None or real.floor_pool is None:
            return None
        target = real.features if real.floor_against is None else real.floor_against
        assert target is not None, "a floor is measured against pictures"
        return measure(real.floor_pool[rows], target)

    def frechet(self, metric: str) -> None:
        generated, real = self.pair(metric)

        own = FeatureStatistics.from_features(generated, source=real.statistics.source)
        target = real.statistics if real.features is None else real.features
        found = None
        if self.judge.repetitions:
            found = self.error(real, distance_influences(generated, target))
        self.put(metric, own.distance(real.statistics), found, real=real, floor=self.floor(real, feature_distance))

    def at_infinity(self) -> None:
        generated, real = self.pair("fid_inf")
        value = distance_at_infinity(generated, real.statistics, seed=self.judge.seed)
        found = None
        if self.judge.repetitions:
            draws = self.draws(real, min(LINE_REPETITIONS, self.judge.repetitions))
            rows = [draws.image_rows(number) for number in range(draws.count)]
            values = [distance_at_infinity(generated[one], real.statistics, seed=self.judge.seed) for one in rows]
            found = Error(torch.tensor(values, dtype=torch.float64))
        self.put("fid_inf", value, found, real=real)

    def kid(self) -> None:
        generated, real = self.pair("kid")
        assert real.features is not None
        strata = self.strata(real)
        found = None
        if self.judge.repetitions:
            found = self.error(real, kid_influences(generated, real.features, strata=strata))
        value = kernel_inception_distance(generated, real.features, strata=strata)
        self.put("kid", value, found, real=real, floor=self.kid_floor(real))

    def kid_floor(self, real: ReferenceFeatures) -> float | None:
        rows = real.floor_rows(len(self.material.prompts), seed=self.seed)
        balanced = None
        if rows is not None and real.floor_labels is not None and real.labels is not None:
            balanced = (real.floor_labels[rows], real.labels)
        return self.floor(real, lambda a, b: kernel_inception_distance(a, b, strata=balanced))

    def cmmd(self) -> None:
        generated, real = self.pair("cmmd")
        assert real.features is not None
        found = None
        if self.judge.repetitions:
            found = self.error(real, cmmd_influences(generated, real.features))
        value = clip_maximum_mean_discrepancy(generated, real.features)
        self.put("cmmd", value, found, real=real, floor=self.floor(real, clip_maximum_mean_discrepancy))

    def neighbours(self, of_images: str, of_references: str) -> None:
        """Shares of images and of real pictures, each with the other set as it is: neighbours of rows that are drawn
        twice are no neighbours."""
        generated, real = self.pair("prc")
        assert real.features is not None
        measure = precision_recall if of_images == "precision" else density_coverage
        rows, draws = measure(generated, real.features), self.draws(real)
        self.mean(of_images, rows.of_images, source=real.statistics.source, real=real)
        found = None
        if self.judge.repetitions:
            counts = draws.reference_counts()
            found = Error((counts @ rows.of_references.cpu()) / counts.sum(dim=1))
        self.put(of_references, rows.of_references.mean().item(), found, real=real)

    def classes(self) -> None:
        known = self.judge.reference.classes
        assert known is not None
        assert self.labels is not None
        assert self.material.right is not None
        self.mean("accuracy", self.material.right, source="classifier", floor=known.accuracy)
        features = self.material.features["image"]
        pairs = PairDistances.of(features, self.labels)
        found = Error(pairs.means(self.draws(None).image_counts())) if self.judge.repetitions else None
        source = self.judge.reference.extractors["image"].name
        self.put("diversity", pairs.mean(), found, source=source, floor=known.diversity)

    def mean(
        self, key: str, rows: Tensor, *, source: str, real: ReferenceFeatures | None = None, floor: float | None = None
    ) -> None:
        """The mean of one number per image."""
        rows, found = rows.double().cpu(), None
        if self.judge.repetitions:
            counts = self.draws(None).image_counts()
            found = Error((counts @ rows) / counts.sum(dim=1))
        self.put(key, rows.mean().item(), found, real=real, source=source, floor=floor)

    def put(
        self,
        key: str,
        value: float,
        error: Error | None,
        *,
        real: ReferenceFeatures | None = None,
        source: str = "",
        floor: float | None = None,
    ) -> None:
        """A figure with its interval; `real` are the pictures that the images were held against, if any."""
        count = len(self.material.prompts)
        references = None if real is None else real.statistics.samples
        between = None
        if error is not None:
            self.errors[key] = error
            if key in SHARES:
                rows = references if key in SHARES_OF_REFERENCES else count
                assert rows is not None
                between = proportion_interval(value, error, samples=rows)
            else:
                between = interval_of(value, error, low=0.0 if key in NEVER_NEGATIVE else -math.inf)
        self.figures[key] = Measured(
            value,
            None if between is None else between.low,
            None if between is None else between.high,
            samples=count,
            source=source if real is None else real.statistics.source,
            references=references,
            floor=floor,
            warnings=() if real is None else _warnings(key, count, real),
        )


def _warnings(key: str, count: int, real: ReferenceFeatures) -> tuple[str, ...]:
    """What makes a distance of few images hard to believe."""
    found, width = [], len(real.statistics.mean)
    if count < FEW_IMAGES:
        found.append(f"{count} images, fewer than {FEW_IMAGES}: for trying out, not for publishing")
    if count <= width and key in BY_STATISTICS:
        found.append(f"{count} images for {width} features: their covariance is singular")
    return tuple(found)
