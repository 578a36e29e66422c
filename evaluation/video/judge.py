"""Films of stores judged and compared: curves of every film, scorers of clips and frames, and a Frechet video distance.

Shapes: N films, clips [B, 3, T, H, W] in [0, 1], scores [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.core.media.pictures import fit_picture, natural_order
from fewstep.core.media.videos import VIDEO_SUFFIXES, iterate_frames
from fewstep.core.training.sample_grid import ROW_FRAMES
from fewstep.evaluation.curves import Curve
from fewstep.evaluation.evaluate import Comparison, SampleGrid, row_differences
from fewstep.evaluation.measures.frechet import distance_influences
from fewstep.evaluation.measures.resampling import Draws, Error, Population, interval_of
from fewstep.evaluation.measures.statistics import feature_distance
from fewstep.evaluation.results import EvaluationResult, Measured, MeasureKind, ReportRow
from fewstep.evaluation.samples.store import SampleStore
from fewstep.evaluation.scorers.scorer import Scorer, score
from fewstep.evaluation.video.curves import LEVELS, VideoCurves, video_curves
from fewstep.evaluation.video.features import ClipFeatures, clip_features, first_frames

KINDS = {
    "flickering": MeasureKind("flickering", "still frames", digits=4, lower_is_better=None),
    "change": MeasureKind("change", "change", digits=2, lower_is_better=None),
    "bend": MeasureKind("bend", "bend", digits=2),
    "boundary": MeasureKind("boundary", "boundary ratio", digits=3, lower_is_better=None),
    **{
        f"drift_{level}": MeasureKind(f"drift_{level}", f"{level} drift", digits=2, lower_is_better=None)
        for level in LEVELS
    },
    "fvd": MeasureKind("fvd", "FVD"),
}
SHOWN_SIDE, SHOWN_FILMS = 128, 3


@dataclass(frozen=True)
class FilmJudge:
    """What films are measured by. `reference` are features [M, D] of real clips of `frames` frames, or None."""

    scorers: tuple[Scorer, ...] = ()
    extractor: ClipFeatures | None = None
    reference: Tensor | None = None
    reference_name: str = "no reference"
    frames: int = 16
    repetitions: int = 200
    device: str = "cpu"


@dataclass(frozen=True)
class Films:
    """Films of one system, a prompt each, and the frames at which chunks begin (of causal students)."""

    name: str
    files: tuple[Path, ...]
    prompts: tuple[str, ...]
    starts: tuple[int, ...] = ()
    seed: int = 0

    @classmethod
    def read(cls, name: str, folder: str | Path) -> Films:
        """From a store, or from any folder of films, whose names are then the prompts. Raises ValueError for none."""
        place = Path(folder)
        if (place / "store.json").is_file():
            store = SampleStore.open(place)
            samples = [sample for _, sample in sorted(store.samples().items())]
            starts = tuple(store.plan.call.get("chunk_starts", ()))
            files = tuple(place / sample.file for sample in samples)
            found = cls(name, files, tuple(sample.prompt for sample in samples), starts, store.plan.seed)
        else:
            if not place.is_dir():
                raise ValueError(f"there is no directory {place} of films")
            paths = [path for path in place.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES]
            paths = sorted(
                (path for path in paths if not path.name.startswith(".")), key=lambda p: natural_order(p.name)
            )
            found = cls(name, tuple(paths), tuple(path.stem.rpartition("-")[0] or path.stem for path in paths))
        if len(found.files) < 2:
            raise ValueError(f"{place} holds {len(found.files)} films; an interval needs at least two")
        return found


def judge_films(judge: FilmJudge, films: Films) -> tuple[EvaluationResult, list[Curve]]:
    """The figures of a system's films, and their mean curves over time."""
    curves, scores = [], {one.card.name: [] for one in judge.scorers}
    for file, prompt in zip(tqdm(films.files, desc=films.name, unit="film"), films.prompts, strict=True):
        curves.append(video_curves(iterate_frames(file)))
        for one in judge.scorers:
            clip = _whole(file)[None].to(judge.device)
            scores[one.card.name].append(score(one, clip, [prompt])[0].item())
    rows = {"flickering": [one.flickering() for one in curves], "change": [float(one.change.mean()) for one in curves]}
    rows["bend"] = [float(one.bend.mean()) for one in curves]
    if any(0 < start < len(curves[0].brightness) for start in films.starts):
        rows["boundary"] = [one.boundary_ratio(films.starts) for one in curves]
    rows |= {f"drift_{level}": [one.drift(level) for one in curves] for level in LEVELS}
    images = Population.of_prompts(films.prompts)
    draws = Draws(images, None, judge.repetitions)
    figures, errors = {}, {}
    sources = {one.card.name: one.card.weights or one.card.name for one in judge.scorers}
    for key, values in {**rows, **scores}.items():
        numbers = torch.tensor(values, dtype=torch.float64)
        counts = draws.image_counts()
        error = Error((counts @ numbers) / counts.sum(dim=1))
        between = interval_of(numbers.mean().item(), error)
        source = sources.get(key, "frames as stored")
        figures[key] = Measured(numbers.mean().item(), between.low, between.high, len(values), source)
        errors[key] = error
    if judge.extractor is not None and judge.reference is not None:
        figures["fvd"], errors["fvd"] = _video_distance(judge, films, images)
    result = EvaluationResult(films.name, 0, 1.0, films.seed, len(films.files), figures, errors)
    return result, mean_curves(films.name, curves)


def _video_distance(judge: FilmJudge, films: Films, images: Population) -> tuple[Measured, Error]:
    assert judge.extractor is not None
    assert judge.reference is not None
    features = clip_features(judge.extractor, films.files, frames=judge.frames)
    real = judge.reference
    draws = Draws(images, Population(len(real)), judge.repetitions)
    error = Error.of_distance(distance_influences(features, real), draws)
    value = feature_distance(features, real)
    between = interval_of(value, error, low=0.0)
    warnings = ()
    if len(features) <= features.shape[1]:
        warnings = (f"{len(features)} films for {features.shape[1]} features: their covariance is singular",)
    name = f"{judge.extractor.name}, first {judge.frames} frames"
    count = len(features)
    return Measured(value, between.low, between.high, count, name, references=len(real), warnings=warnings), error


def mean_curves(name: str, curves: Sequence[VideoCurves]) -> list[Curve]:
    """Means over films of each curve, as far as all films go."""
    found = []
    for key in ("change", "bend", *LEVELS):
        length = min(len(getattr(one, key)) for one in curves)
        values = np.mean([getattr(one, key)[:length] for one in curves], axis=0)
        found.append(Curve(name, key, tuple(range(length)), tuple(float(value) for value in values)))
    return found


def _whole(file: Path) -> Tensor:
    count = sum(1 for _ in iterate_frames(file))
    return first_frames(file, count)


def compare_films(judge: FilmJudge, systems: Sequence[Films]) -> tuple[Comparison, list[Curve]]:
    """All systems beside the first, film by film, and the curves of all. Raises ValueError for no systems."""
    if not systems:
        raise ValueError("no films to judge; give --videos FOLDER")
    rows, curves = [], []
    for films in systems:
        result, own = judge_films(judge, films)
        rows.append(ReportRow(films.name, 0, 1.0, (result,)))
        curves += own
    keys = list(dict.fromkeys(key for row in rows for key in row.results[0].figures))
    shown = {one.card.name: not one.card.higher_is_better for one in judge.scorers}
    kinds = tuple(KINDS.get(key) or MeasureKind(key, key, 3, lower_is_better=shown[key]) for key in keys)
    strips = tuple(torch.cat([_strip(file) for file in films.files[:SHOWN_FILMS]]) for films in systems)
    grid = SampleGrid(systems[0].prompts[:SHOWN_FILMS], systems[0].seed, tuple(row.name for row in rows), strips, None)
    differences = row_differences(rows, kinds, 0)
    return Comparison(tuple(rows), kinds, differences, 0, grid, judge.reference_name), curves


def _strip(file: Path) -> Tensor:
    """A few frames of a film [K, 3, h, w], small."""
    frames = list(iterate_frames(file))
    few = max(2, ROW_FRAMES // SHOWN_FILMS)
    places = torch.linspace(0, len(frames) - 1, few).round().long().tolist()
    factor = min(1.0, SHOWN_SIDE / max(frames[0].size))
    height, width = (max(1, round(side * factor)) for side in (frames[0].height, frames[0].width))
    return torch.stack([fit_picture(frames[place], height, width) for place in places])
