"""VBench's total: normalised scores, their weights, intervals over prompts, and the file for its leaderboard."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.evaluation.measures.resampling import Error, Interval, Population, interval_of
from fewstep.evaluation.vbench.constants import COMMIT, DIMENSIONS, QUALITY_WEIGHT, SEMANTIC_WEIGHT
from fewstep.evaluation.vbench.score import PROTOCOL, RESULTS

REPETITIONS = 1000


@dataclass(frozen=True)
class Scored:
    """A dimension's raw score as VBench gives it, and the result of each video [N] with its prompt.

    `rows` is None where the results of the videos are no numbers that average to the score (VBench averages some over
    frames, and some over all videos of all prompts).
    """

    raw: float
    prompts: tuple[str, ...]
    rows: tuple[float, ...] | None


@dataclass(frozen=True)
class Totals:
    """Quality, semantic and total in [0, 1], each None while one of its dimensions is missing, with intervals."""

    quality: float | None
    semantic: float | None
    total: float | None
    intervals: dict[str, Interval]
    missing: tuple[str, ...]


def read_results(folder: str | Path) -> dict[str, Scored]:
    """All dimensions that were scored in a folder. Raises ValueError for files that are no results, and for none."""
    found = {}
    for file in sorted((Path(folder) / RESULTS).glob("*.json")):
        try:
            for name, (raw, videos) in json.loads(file.read_text(encoding="utf-8")).items():
                if name not in DIMENSIONS:
                    raise ValueError(f"the dimension {name!r} is unknown")
                if not math.isfinite(float(raw)):
                    raise ValueError(f"the score of {name} is {raw}")
                found[name] = _scored(float(raw), videos)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is no result of VBench: {error}") from error
    if not found:
        raise ValueError(f"{folder} has no results; score the videos first")
    return found


def _scored(raw: float, videos: Sequence[Mapping[str, object]]) -> Scored:
    prompts = tuple(Path(str(video["video_path"])).stem.rpartition("-")[0] for video in videos)
    values = [video.get("video_results") for video in videos]
    if not values or not all(isinstance(value, int | float) for value in values):
        return Scored(raw, prompts, None)
    rows = tuple(float(value) for value in values)  # pyright: ignore[reportArgumentType]
    return Scored(raw, prompts, rows if abs(sum(rows) / len(rows) - raw) < 1e-6 * max(1.0, abs(raw)) else None)


def normalised(name: str, raw: float) -> float:
    """A raw score on VBench's scale of a dimension; not clipped, as VBench does not."""
    kind = DIMENSIONS[name]
    return (raw - kind.low) / (kind.high - kind.low)


def group_score(raw: Mapping[str, float], *, quality: bool) -> float | None:
    """The weighted mean of one half of the dimensions; None while one of them is missing, which VBench counts as 0."""
    names = [name for name, kind in DIMENSIONS.items() if kind.quality == quality]
    if any(name not in raw for name in names):
        return None
    total = sum(normalised(name, raw[name]) * DIMENSIONS[name].weight for name in names)
    return total / sum(DIMENSIONS[name].weight for name in names)


def total_score(quality: float, semantic: float) -> float:
    """(4 quality + semantic) / 5."""
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def totals(scores: Mapping[str, Scored], *, seed: int = 0) -> Totals:
    """The halves and the total, with 95 % intervals over prompts.

    Prompts of a dimension are drawn again with all their videos, dimensions with the same prompts together. A dimension
    whose videos do not average to its score stays as it is, so intervals with such ones are too narrow.
    """
    raw = {name: one.raw for name, one in scores.items()}
    quality, semantic = group_score(raw, quality=True), group_score(raw, quality=False)
    total = None if quality is None or semantic is None else total_score(quality, semantic)
    drawn = _draws(scores, seed=seed)
    intervals: dict[str, Interval] = {}
    for name, values in drawn.items():
        intervals[name] = interval_of(raw[name], Error(values))
    for key, value, kind in (("quality", quality, True), ("semantic", semantic, False)):
        if value is not None:
            intervals[key] = interval_of(value, Error(_group_draws(raw, drawn, quality=kind)))
    if total is not None:
        halves = [_group_draws(raw, drawn, quality=kind) for kind in (True, False)]
        mixed = (QUALITY_WEIGHT * halves[0] + SEMANTIC_WEIGHT * halves[1]) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
        assert total is not None
        intervals["total"] = interval_of(total, Error(mixed))
    missing = tuple(name for name in DIMENSIONS if name not in scores)
    return Totals(quality, semantic, total, intervals, missing)


def _draws(scores: Mapping[str, Scored], *, seed: int) -> dict[str, Tensor]:
    """Each dimension's score over repetitions [R]."""
    found = {}
    for name, one in scores.items():
        if one.rows is None or len(set(one.prompts)) < 2:
            continue
        population = Population.of_prompts(one.prompts)
        rows, values = torch.tensor(one.rows, dtype=torch.float64), []
        for number in range(REPETITIONS):
            # The same prompts in the same order draw the same rows.
            drawn = population.draw(torch.Generator().manual_seed(seed * 1_000_003 + number))
            values.append(rows[drawn].mean())
        found[name] = torch.stack(values)
    return found


def _group_draws(raw: Mapping[str, float], drawn: Mapping[str, Tensor], *, quality: bool) -> Tensor:
    total, weight = torch.zeros(REPETITIONS, dtype=torch.float64), 0.0
    for name, kind in DIMENSIONS.items():
        if kind.quality == quality:
            values = drawn.get(name, torch.full((REPETITIONS,), raw[name], dtype=torch.float64))
            total += kind.weight * (values - kind.low) / (kind.high - kind.low)
            weight += kind.weight
    return total / weight


def write_submission(folder: str | Path) -> Path:
    """The zip that VBench's leaderboard takes: the result files. Raises ValueError while a dimension is missing."""
    scores = read_results(folder)
    missing = [name for name in DIMENSIONS if name not in scores]
    if missing:
        raise ValueError(f"a submission needs all dimensions; missing are {', '.join(missing)}")
    target = Path(folder) / "submission.zip"
    partial = target.with_name(".submission.zip.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((Path(folder) / RESULTS).glob("*.json")):
            archive.write(file, file.name)
    partial.replace(target)
    return target


def protocol_line(folder: str | Path) -> str:
    """How the scores came about, in one line for a table."""
    file = Path(folder) / PROTOCOL
    if not file.is_file():
        return f"constants of VBench {COMMIT[:7]}; how the videos were scored is not recorded"
    known = json.loads(file.read_text(encoding="utf-8"))
    static = "static filter" if known["static_filter"] else "no static filter"
    whole = "SOME VIDEOS MISSING" if known["partial"] else "all videos"
    return (
        f"{known['suite']}, constants of {COMMIT[:7]}, {known['videos_per_prompt']} videos a prompt, {static}, "
        f"{whole}, {known['processes']} process, {known['device']}, {len(known['weights'])} weights by digest"
    )
