"""Judge exported pipelines: quality with given seeds, speed of the stock call, and sample grids.

Shapes: pixels [N, 3, H, W] in [0, 1], features [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fewstep.evaluation.clip_score import ClipScorer, load_clip_scorer, mean_clip_score
from fewstep.evaluation.fid import extract_features, score_fid, score_kid
from fewstep.evaluation.generation import StockCall, generate, load_pipeline
from fewstep.evaluation.inception import WEIGHTS_NAME, load_inception_features
from fewstep.evaluation.latency import LatencyResult, TimingPlan, measure_latency
from fewstep.evaluation.references import Reference, folder_reference
from fewstep.evaluation.results import EvaluationResult, ReportRow
from fewstep.evaluation.systems import OwnReference, System, require_samples


@dataclass(frozen=True)
class Judge:
    """What generated images are held against, and what else they are scored with."""

    reference: Reference
    clip: ClipScorer | None = None
    clip_weights: str = ""


@dataclass(frozen=True)
class SampleGrid:
    """Images of the same prompts and indices by several systems: pixels[i] is [K, 3, H, W] of the system names[i].

    `real` holds real images, perhaps one per prompt.
    """

    prompts: tuple[str, ...]
    seed: int
    names: tuple[str, ...]
    pixels: tuple[Tensor, ...]
    real: Tensor


@dataclass(frozen=True)
class Comparison:
    """All rows, the grid, and the scores of real images that stand above them.

    `measured` has the results of each pipeline directory, before those of one recipe become one row. Without a
    classifier accuracy and diversity are None; `floor_of_halves` tells that the floor compares two halves of a folder.
    """

    rows: tuple[ReportRow, ...]
    grid: SampleGrid
    reference_split: str
    reference_samples: int
    reference_accuracy: float | None
    reference_diversity: float | None
    measured: tuple[tuple[System, tuple[EvaluationResult, ...]], ...] = ()
    floor_of_halves: bool = False


def build_judge(
    own: OwnReference,
    *,
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    clip_model: str | None = None,
) -> Judge:
    """A judge whose reference is the user's own prompts and pictures.

    `inception` and `clip` are local weights (see `load_inception_features` and `load_clip_scorer`): the first gives the
    features of FID and KID, the second adds the CLIP score. Raises ValueError for missing weights, prompts or pictures.
    """
    if inception is None:
        raise ValueError(
            "FID and KID of your own pictures need Inception features; give --inception FILE, the weights "
            f"{WEIGHTS_NAME} of torch-fidelity (v0.2.0)"
        )
    reference = folder_reference(own, extractor=load_inception_features(inception))
    return with_clip(Judge(reference), clip, model=clip_model)


def with_clip(judge: Judge, clip: str | Path | None, *, model: str | None = None) -> Judge:
    """The judge with a CLIP score from local weights, or as it is for None."""
    if clip is None:
        return judge
    return replace(judge, clip=load_clip_scorer(clip, model=model), clip_weights=Path(clip).name)


def judge_pixels(
    judge: Judge, pixels: Tensor, *, prompts: Sequence[str], system: System, seed: int
) -> EvaluationResult:
    """Score pixels [N, 3, H, W] in [0, 1] that `system` drew for `prompts` with `seed`."""
    reference = judge.reference
    features = extract_features(reference.extractor, pixels)
    accuracy, diversity, clip = None, None, None
    if reference.classes is not None:
        accuracy, diversity = reference.classes.score(pixels, features, prompts=prompts)
    if judge.clip is not None:
        clip = mean_clip_score(judge.clip, pixels, prompts=list(prompts), weights=judge.clip_weights)
    return EvaluationResult(
        name=system.name,
        steps=system.steps,
        guidance=system.guidance,
        seed=seed,
        samples=len(pixels),
        fid=score_fid(features, reference.real, seed=seed),
        kid=score_kid(features, reference.real, seed=seed),
        accuracy=accuracy,
        diversity=diversity,
        clip=clip,
    )


def _time(systems: Sequence[System], *, reference: Reference, plan: TimingPlan, device: str) -> list[LatencyResult]:
    """Time freshly loaded pipelines, which nothing of the evaluation has touched."""
    prompts = tuple(reference.sample_prompts(plan.batch_size))
    calls = [StockCall(load_pipeline(system.path, device=device), system, prompts) for system in systems]
    return measure_latency(calls, plan=plan, device=device)


def draw_samples(pipeline: Any, system: System, *, prompts: Sequence[str], seed: int, batch_size: int) -> Tensor:
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
    require_samples(samples)
    reference = judge.reference
    prompts, grid_prompts = reference.sample_prompts(samples), reference.grid_prompts
    results: list[list[EvaluationResult]] = []
    drawn: list[Tensor] = []
    for system in tqdm(systems, desc="systems", unit="system"):
        pipeline = load_pipeline(system.path, device=device)
        own = []
        for seed in seeds:
            pixels = draw_samples(pipeline, system, prompts=prompts, seed=seed, batch_size=batch_size)
            own.append(judge_pixels(judge, pixels, prompts=prompts, system=system, seed=seed))
        results.append(own)
        drawn.append(draw_samples(pipeline, system, prompts=grid_prompts, seed=seeds[0], batch_size=batch_size))
    groups = _group(systems, results)
    chosen = [system for system, _ in groups]
    latencies = [None] * len(chosen)
    if timing is not None:
        latencies = _time(chosen, reference=reference, plan=timing, device=device)
    rows = [
        ReportRow(system.name, system.steps, system.guidance, own, latency)
        for (system, own), latency in zip(groups, latencies, strict=True)
    ]
    pixels_of = {id(system): pixels for system, pixels in zip(systems, drawn, strict=True)}
    grid = SampleGrid(
        prompts=grid_prompts,
        seed=seeds[0],
        names=tuple(row.label() for row in rows),
        pixels=tuple(pixels_of[id(system)] for system in chosen),
        real=reference.grid_pixels,
    )
    classes = reference.classes
    return Comparison(
        rows=tuple(rows),
        grid=grid,
        reference_split=reference.real.split,
        reference_samples=len(reference.real.features),
        reference_accuracy=None if classes is None else classes.accuracy,
        reference_diversity=None if classes is None else classes.diversity,
        measured=tuple(zip(systems, (tuple(own) for own in results), strict=True)),
        floor_of_halves=reference.real.floor_against is not None,
    )
