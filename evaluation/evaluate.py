"""Judge exported pipelines: quality with given seeds, speed of the stock call, and sample grids.

Shapes: pixels [N, 3, 32, 32] in [0, 1], labels [N], features [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.core.embedded.digits import balanced_prompt, caption, label_of_prompt, load_digits_split
from fewstep.evaluation.accuracy import AccuracyResult, DiversityResult, class_accuracy, within_class_diversity
from fewstep.evaluation.clip_score import ClipScorer, load_clip_scorer, mean_clip_score
from fewstep.evaluation.digits_classifier import DigitFeatures, DigitsClassifier, load_classifier
from fewstep.evaluation.fid import ReferenceFeatures, extract_features, score_fid, score_kid
from fewstep.evaluation.generation import StockCall, generate, load_pipeline
from fewstep.evaluation.inception import load_inception_features
from fewstep.evaluation.latency import LatencyResult, TimingPlan, measure_latency
from fewstep.evaluation.results import EvaluationResult, ReportRow
from fewstep.evaluation.systems import System, read_system, require_samples

DEFAULT_CLASSIFIER = Path("assets/digits_image/classifier")
SPLITS = ("test", "train")


@dataclass(frozen=True)
class Judge:
    """What generated digits are held against: a classifier, the features of real images, and their own scores."""

    classifier: DigitsClassifier
    extractor: nn.Module
    reference: ReferenceFeatures
    reference_accuracy: float
    reference_diversity: float
    clip: ClipScorer | None = None
    clip_weights: str = ""


@dataclass(frozen=True)
class SampleGrid:
    """Images of the same prompts and indices by several systems: pixels[i] is [K, 3, 32, 32] of the system names[i].

    `real` holds one real image per prompt.
    """

    prompts: tuple[str, ...]
    seed: int
    names: tuple[str, ...]
    pixels: tuple[Tensor, ...]
    real: Tensor


@dataclass(frozen=True)
class Comparison:
    """All rows, the grid, and the scores of real images that stand above them.

    `measured` has the results of each pipeline directory, before those of one recipe become one row.
    """

    rows: tuple[ReportRow, ...]
    grid: SampleGrid
    reference_split: str
    reference_samples: int
    reference_accuracy: float
    reference_diversity: float
    measured: tuple[tuple[System, tuple[EvaluationResult, ...]], ...] = ()


def build_judge(
    reference: str,
    *,
    classifier: str | Path | DigitsClassifier = DEFAULT_CLASSIFIER,
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    clip_model: str | None = None,
) -> Judge:
    """A judge whose reference is the digits split `reference`, "test" or "train"; the other split measures the floor.

    `inception` and `clip` are local weights (see `load_inception_features` and `load_clip_scorer`): the first takes the
    place of the classifier's features in FID, KID and diversity, the second adds the CLIP score.
    Raises ValueError for another split or missing weights.
    """
    if reference not in SPLITS:
        raise ValueError(f"reference is {reference!r}; use one of {', '.join(SPLITS)}")
    network = classifier if isinstance(classifier, DigitsClassifier) else load_classifier(classifier)
    features = DigitFeatures(network) if inception is None else load_inception_features(inception)
    real = load_digits_split("test" if reference == "test" else "train")
    other = load_digits_split("train" if reference == "test" else "test")
    rows = extract_features(features, real.pixels)
    accuracy, _ = class_accuracy(network, real.pixels, labels=real.labels)
    return Judge(
        classifier=network,
        extractor=features,
        reference=ReferenceFeatures(
            split=reference,
            features=rows,
            floor_pool=extract_features(features, other.pixels),
            floor_labels=other.labels,
            feature_extractor=features.name,
        ),
        reference_accuracy=accuracy,
        reference_diversity=within_class_diversity(rows, real.labels),
        clip=None if clip is None else load_clip_scorer(clip, model=clip_model),
        clip_weights="" if clip is None else Path(clip).name,
    )


def evaluation_prompts(samples: int) -> list[str]:
    """The prompts of samples 0 ... samples - 1, which follow the captions of the data.

    Raises ValueError for too few samples to hold every digit twice.
    """
    require_samples(samples)
    return [balanced_prompt(index) for index in range(samples)]


def judge_pixels(
    judge: Judge, pixels: Tensor, *, prompts: Sequence[str], system: System, seed: int
) -> EvaluationResult:
    """Score pixels [N, 3, 32, 32] in [0, 1] that `system` drew for `prompts` with `seed`."""
    labels = torch.tensor([label_of_prompt(prompt) for prompt in prompts])
    features = extract_features(judge.extractor, pixels)
    accuracy, per_class = class_accuracy(judge.classifier, pixels, labels=labels)
    clip = None
    if judge.clip is not None:
        clip = mean_clip_score(judge.clip, pixels, prompts=list(prompts), weights=judge.clip_weights)
    return EvaluationResult(
        name=system.name,
        steps=system.steps,
        guidance=system.guidance,
        seed=seed,
        samples=len(pixels),
        fid=score_fid(features, judge.reference, seed=seed),
        kid=score_kid(features, judge.reference, seed=seed),
        accuracy=AccuracyResult(accuracy, len(pixels), judge.reference_accuracy, tuple(per_class)),
        diversity=DiversityResult(within_class_diversity(features, labels), judge.reference_diversity),
        clip=clip,
    )


def evaluate_pipeline(
    path: str | Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    samples: int = 500,
    seed: int = 0,
    reference: str = "test",
    classifier: str | Path | DigitsClassifier = DEFAULT_CLASSIFIER,
    batch_size: int = 64,
) -> EvaluationResult:
    """Quality of the pipeline in the directory `path` over `samples` images; its speed is the matter of `compare`.

    steps and guidance None are read from the export's distillation.json. Raises ValueError for bad input.
    """
    prompts = evaluation_prompts(samples)
    system = read_system(path, steps=steps, guidance=guidance)
    judge = build_judge(reference, classifier=classifier)
    pixels = _draw(load_pipeline(path), system, prompts=prompts, seed=seed, batch_size=batch_size)
    return judge_pixels(judge, pixels, prompts=prompts, system=system, seed=seed)


def _grid_prompts() -> list[str]:
    """One prompt per digit, without a stroke weight."""
    return [caption(digit, weight=None, phrasing=0) for digit in range(10)]


def _real_row(split: str) -> Tensor:
    """The first real image of each digit of a split, [10, 3, 32, 32]."""
    images = load_digits_split("test" if split == "test" else "train")
    return torch.stack([images.pixels[images.labels == digit][0] for digit in range(10)])


def _time(systems: Sequence[System], *, plan: TimingPlan, device: str) -> list[LatencyResult]:
    """Time freshly loaded pipelines, which nothing of the evaluation has touched."""
    prompts = tuple(balanced_prompt(index) for index in range(plan.batch_size))
    calls = [StockCall(load_pipeline(system.path, device=device), system, prompts) for system in systems]
    return measure_latency(calls, plan=plan, device=device)


def _draw(pipeline: Any, system: System, *, prompts: Sequence[str], seed: int, batch_size: int) -> Tensor:
    """Pixels of prompts 0, 1, ... as `system` calls the pipeline."""
    return generate(
        pipeline,
        prompts,
        indices=range(len(prompts)),
        seed=seed,
        steps=system.steps,
        guidance=system.guidance,
        batch_size=batch_size,
        grid=system.grid,
    )


def _group(
    systems: Sequence[System], results: Sequence[list[EvaluationResult]]
) -> list[tuple[System, tuple[EvaluationResult, ...]]]:
    """Systems that share name, steps and guidance are one row: runs of one recipe with several training seeds."""
    groups: dict[tuple[str, int, float], tuple[System, list[EvaluationResult]]] = {}
    for system, own in zip(systems, results, strict=True):
        groups.setdefault((system.name, system.steps, system.guidance), (system, []))[1].extend(own)
    return [(system, tuple(own)) for system, own in groups.values()]


def compare(
    systems: Sequence[System],
    *,
    judge: Judge,
    samples: int = 500,
    seeds: Sequence[int] = (0,),
    batch_size: int = 64,
    timing: TimingPlan | None = None,
    device: str = "cpu",
) -> Comparison:
    """Judge all systems with the same prompts and seeds, time their stock calls in turns, and draw a grid of each.

    timing None leaves speed out. Systems of equal name, steps and guidance become one row with a spread.
    Raises ValueError for no systems or seeds, and for too few samples.
    """
    if len(systems) == 0 or len(seeds) == 0:
        raise ValueError(f"{len(systems)} systems and {len(seeds)} seeds; give at least one of each")
    prompts, grid_prompts = evaluation_prompts(samples), _grid_prompts()
    results: list[list[EvaluationResult]] = []
    drawn: list[Tensor] = []
    for system in tqdm(systems, desc="systems", unit="system"):
        pipeline = load_pipeline(system.path, device=device)
        own = []
        for seed in seeds:
            pixels = _draw(pipeline, system, prompts=prompts, seed=seed, batch_size=batch_size)
            own.append(judge_pixels(judge, pixels, prompts=prompts, system=system, seed=seed))
        results.append(own)
        drawn.append(_draw(pipeline, system, prompts=grid_prompts, seed=seeds[0], batch_size=batch_size))
    groups = _group(systems, results)
    chosen = [system for system, _ in groups]
    latencies = [None] * len(chosen) if timing is None else _time(chosen, plan=timing, device=device)
    rows = [
        ReportRow(system.name, system.steps, system.guidance, own, latency)
        for (system, own), latency in zip(groups, latencies, strict=True)
    ]
    pixels_of = {id(system): pixels for system, pixels in zip(systems, drawn, strict=True)}
    grid = SampleGrid(
        prompts=tuple(grid_prompts),
        seed=seeds[0],
        names=tuple(row.label() for row in rows),
        pixels=tuple(pixels_of[id(system)] for system in chosen),
        real=_real_row(judge.reference.split),
    )
    return Comparison(
        rows=tuple(rows),
        grid=grid,
        reference_split=judge.reference.split,
        reference_samples=len(judge.reference.features),
        reference_accuracy=judge.reference_accuracy,
        reference_diversity=judge.reference_diversity,
        measured=tuple(zip(systems, (tuple(own) for own in results), strict=True)),
    )
