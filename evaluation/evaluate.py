"""Judge pipelines and folders of pictures: samples are drawn into stores, scored from there, and compared in pairs.

Shapes: pixels [N, 3, H, W] in [0, 1], features [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.core.media.pictures import find_pictures, open_picture, read_picture
from fewstep.evaluation.generation import StockCall
from fewstep.evaluation.judge import FEATURES, Judge, Material, judge_material, score_batches
from fewstep.evaluation.latency import LatencyResult, TimingPlan, measure_latency
from fewstep.evaluation.measures.features import Pictures, batches, extract_features, picture_features
from fewstep.evaluation.measures.resampling import Difference
from fewstep.evaluation.references import Reference
from fewstep.evaluation.results import EvaluationResult, MeasureKind, ReportRow
from fewstep.evaluation.samples.pipelines import OnePipeline, Sampling, draw_stores
from fewstep.evaluation.samples.store import STORE_FILE, SampleStore
from fewstep.evaluation.systems import System, require_samples

SHOWN_SIDE = 256
# Of the best and of the worst images each.
EXTREMES = 5


@dataclass(frozen=True)
class SampleGrid:
    """Images of the same prompts and indices by several systems: pixels[i] is [K, 3, H, W] of the system names[i].

    `real` holds real images, perhaps one per prompt, None where there are none.
    """

    prompts: tuple[str, ...]
    seed: int
    names: tuple[str, ...]
    pixels: tuple[Tensor, ...]
    real: Tensor | None


@dataclass(frozen=True)
class Strip:
    """The best and the worst images [K, 3, H, W] of a row, from left to right."""

    caption: str
    pixels: Tensor


@dataclass(frozen=True)
class Comparison:
    """All rows with their differences to the baseline, the grid, and what the images were held against.

    `differences[i]` has those of row i by key, empty for the baseline itself and without intervals. `measured` has the
    results of each pipeline, before those of one recipe become one row. `floor_of_halves` tells that the floor compares
    two halves of a folder.
    """

    rows: tuple[ReportRow, ...]
    kinds: tuple[MeasureKind, ...]
    differences: tuple[dict[str, Difference], ...]
    baseline: int
    grid: SampleGrid
    reference: str
    extremes: tuple[Strip, ...] = ()
    measured: tuple[tuple[System, tuple[EvaluationResult, ...]], ...] = ()
    floor_of_halves: bool = False
    notes: tuple[str, ...] = ()


def judge_pixels(
    judge: Judge, pixels: Tensor, *, prompts: Sequence[str], system: System, seed: int, device: str = "cpu"
) -> EvaluationResult:
    """Judge pixels [N, 3, H, W] in [0, 1] in memory, as a store of the same pictures would be."""
    stored = (pixels * 255.0).round() / 255.0
    material = Material(list(prompts))
    for key in _feature_keys(judge):
        material.features[key] = extract_features(judge.reference.extractors[key], stored)
    batch = [list(part) for part in stored.split(64)]
    material.scores, material.right = score_batches(judge, prompts, batch, device=device)
    return judge_material(judge, material, system=system, seed=seed)


def judge_store(
    judge: Judge, store: SampleStore, *, count: int, system: System, device: str = "cpu", workers: int = 0
) -> EvaluationResult:
    """Judge the first `count` samples of a store; features are kept beside it. Raises ValueError for missing ones."""
    samples = store.require(count)
    store.require_unchanged(samples)
    files = _Files(
        [store.folder / one.file for one in samples],
        [one.prompt for one in samples],
        cache=store.folder / ".features",
        key="".join(one.sha256 for one in samples),
    )
    return _judge_files(judge, files, system=system, seed=store.plan.seed, device=device, workers=workers)


def judge_folder(judge: Judge, system: System, *, device: str = "cpu", workers: int = 0) -> EvaluationResult:
    """Judge a folder of pictures that came from anywhere: picture i, in natural order, is of prompt i modulo their
    number; a store of samples knows its own prompts.
    """
    if (Path(system.path) / STORE_FILE).is_file():
        store = SampleStore.open(system.path)
        return judge_store(judge, store, count=len(store.samples()), system=system, device=device, workers=workers)
    paths = find_pictures(system.path)
    files = _Files(paths, judge.reference.sample_prompts(len(paths)))
    return _judge_files(judge, files, system=system, seed=0, device=device, workers=workers)


@dataclass(frozen=True)
class _Files:
    """Picture files and their prompts, and where features of them are kept under which key."""

    paths: list[Path]
    prompts: list[str]
    cache: Path | None = None
    key: str | None = None


def _judge_files(
    judge: Judge, files: _Files, *, system: System, seed: int, device: str, workers: int
) -> EvaluationResult:
    require_samples(len(files.paths))
    judge.require_samples(len(files.paths))
    material = Material(files.prompts)
    for key in _feature_keys(judge):
        extractor = judge.reference.extractors[key]
        material.features[key] = picture_features(
            extractor, files.paths, cache=files.cache, key=files.key, workers=workers
        )
    if judge.scorers or "classes" in judge.metrics:
        read = batches(Pictures(files.paths), batch_size=judge.chunk, workers=workers)
        material.scores, material.right = score_batches(judge, files.prompts, read, device=device)
    return judge_material(judge, material, system=system, seed=seed)


def _feature_keys(judge: Judge) -> list[str]:
    """Which features the metrics of a judge need; diversity is measured on those of FID."""
    keys = [FEATURES.get(metric, "image") for metric in judge.metrics]
    return list(dict.fromkeys(keys))


def time_systems(
    systems: Sequence[System], prompts: Sequence[str], *, plan: TimingPlan, sampling: Sampling
) -> list[LatencyResult]:
    """Time stock calls in turns, with one pipeline in memory at a time."""
    holder = OnePipeline(sampling.device)
    chosen = tuple(prompts[: plan.batch_size])
    calls = [StockCall(holder, system, sampling.dtype or system.dtype, chosen) for system in systems]
    found = measure_latency(calls, plan=plan, device=sampling.device)
    holder.free()
    return found


def compare(
    systems: Sequence[System],
    *,
    judge: Judge,
    sampling: Sampling,
    timing: TimingPlan | None = None,
    baseline: int = 0,
    workers: int = 0,
) -> Comparison | None:
    """Judge all systems with the same prompts and seeds, compare each with the row of `baseline`, time, draw a grid.

    Systems of equal name, steps, guidance and call are one row: runs of one recipe with several training seeds.
    timing None leaves speed out. None in processes other than the first, which are done when all samples are drawn.
    Raises ValueError for no systems or seeds, and for too few samples.
    """
    if len(systems) == 0 or len(sampling.seeds) == 0:
        raise ValueError(f"{len(systems)} systems and {len(sampling.seeds)} seeds; give at least one of each")
    require_samples(sampling.samples)
    judge.require_samples(sampling.samples)
    reference = judge.reference
    drawn = [system for system in systems if not system.pictures]
    stores = draw_stores(drawn, reference.prompts, sampling)
    shown = draw_stores(drawn, reference.grid_prompts, sampling, count=len(reference.grid_prompts), kind="_grid")
    if sampling.rank > 0:
        return None
    by_system = dict(zip((id(system) for system in drawn), stores, strict=True))
    results: list[list[EvaluationResult]] = []
    for system in tqdm(systems, desc="judged", unit="system"):
        place = {"system": system, "device": sampling.device, "workers": workers}
        if system.pictures:
            results.append([judge_folder(judge, **place)])
        else:
            own = by_system[id(system)]
            results.append([judge_store(judge, store, count=sampling.samples, **place) for store in own])
    groups = _group(systems, results)
    chosen = [system for system, _ in groups]
    latencies = _latencies(chosen, reference, timing=timing, sampling=sampling)
    rows = tuple(
        ReportRow(system.name, system.steps, system.guidance, own, latency, system.call)
        for (system, own), latency in zip(groups, latencies, strict=True)
    )
    first = chosen.index(next(one for one in chosen if _key(one) == _key(systems[baseline])))
    grid_stores = dict(zip((id(system) for system in drawn), shown, strict=True))
    grid = _grid(judge, rows, [(one, grid_stores.get(id(one))) for one in chosen], seed=sampling.seeds[0])
    image = reference.real.get("image")
    return Comparison(
        rows=rows,
        kinds=judge.kinds(),
        differences=row_differences(rows, judge.kinds(), first),
        baseline=first,
        grid=grid,
        reference=reference.name,
        extremes=_extremes(rows, [(one, by_system.get(id(one))) for one in chosen]),
        measured=tuple(zip(systems, (tuple(own) for own in results), strict=True)),
        floor_of_halves=image is not None and image.floor_against is not None,
        notes=_baseline_notes(chosen, first),
    )


def _latencies(
    systems: Sequence[System], reference: Reference, *, timing: TimingPlan | None, sampling: Sampling
) -> list[LatencyResult | None]:
    """The speed of each system that is a pipeline; None of folders of pictures, and where nothing is timed."""
    found: list[LatencyResult | None] = [None] * len(systems)
    timed = [number for number, system in enumerate(systems) if not system.pictures]
    if timing is not None and timed:
        prompts = reference.sample_prompts(timing.batch_size)
        results = time_systems([systems[number] for number in timed], prompts, plan=timing, sampling=sampling)
        for number, latency in zip(timed, results, strict=True):
            found[number] = latency
    return found


def _key(system: System) -> tuple[str, int, float, str]:
    return system.name, system.steps, system.guidance, system.call


def _group(
    systems: Sequence[System], results: Sequence[list[EvaluationResult]]
) -> list[tuple[System, tuple[EvaluationResult, ...]]]:
    groups: dict[tuple[str, int, float, str], tuple[System, list[EvaluationResult]]] = {}
    for system, own in zip(systems, results, strict=True):
        groups.setdefault(_key(system), (system, []))[1].extend(own)
    return [(system, tuple(own)) for system, own in groups.values()]


def row_differences(
    rows: Sequence[ReportRow], kinds: Sequence[MeasureKind], baseline: int
) -> tuple[dict[str, Difference], ...]:
    found = []
    for number, row in enumerate(rows):
        own = {} if number == baseline else {kind.key: row.difference(rows[baseline], kind.key) for kind in kinds}
        found.append({key: difference for key, difference in own.items() if difference is not None})
    return tuple(found)


def _baseline_notes(systems: Sequence[System], baseline: int) -> tuple[str, ...]:
    """What a reader must know where the baseline is not what the students were distilled from."""
    scale = systems[baseline].guidance
    others = sorted({one.training_guidance for one in systems if one.training_guidance not in (None, scale)}, key=str)
    if not others or systems[baseline].training_guidance is not None:
        return ()
    trained = ", ".join(f"{one:g}" for one in others if one is not None)
    return (
        f"The baseline is called at guidance {scale:g}, and students here were distilled at guidance {trained}: "
        "what they were distilled from is another teacher.",
    )


def _small(files: Sequence[Path]) -> Tensor:
    """Pictures as the page shows them: the size of the first, at most `SHOWN_SIDE` pixels wide and high."""
    first = open_picture(files[0])
    factor = min(1.0, SHOWN_SIDE / max(first.size))
    height, width = (max(1, round(side * factor)) for side in (first.height, first.width))
    return torch.stack([read_picture(file, height, width) for file in files])


def _extremes(
    rows: Sequence[ReportRow], places: Sequence[tuple[System, list[SampleStore] | None]]
) -> tuple[Strip, ...]:
    """The best and the worst images of the first run of each row that ranks its images."""
    strips = []
    for row, (system, stores) in zip(rows, places, strict=True):
        ranking = row.results[0].ranking
        if ranking is None:
            continue
        chosen = [*ranking.order[:EXTREMES], *ranking.order[-EXTREMES:]]
        if stores is None:
            files = find_pictures(system.path)
            files = [files[index] for index in chosen]
        else:
            files = [stores[0].path(index) for index in chosen]
        strips.append(Strip(f"{row.label()}: {EXTREMES} best and {EXTREMES} worst by {ranking.by}", _small(files)))
    return tuple(strips)


def _grid(
    judge: Judge, rows: Sequence[ReportRow], places: Sequence[tuple[System, list[SampleStore] | None]], *, seed: int
) -> SampleGrid:
    """Small copies of the pictures of the grid's prompts; of a folder its first pictures."""
    count = len(judge.reference.grid_prompts)
    pixels = []
    for system, stores in places:
        if stores is None:
            files = find_pictures(system.path)[:count]
        else:
            files = [stores[0].folder / one.file for one in stores[0].require(count)]
        pixels.append(_small(files))
    names = tuple(row.label() for row in rows)
    return SampleGrid(judge.reference.grid_prompts, seed, names, tuple(pixels), judge.reference.grid_pixels)
