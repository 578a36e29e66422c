"""A page of one training run, or of several side by side: curves with what healthy looks like, and settings."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fewstep.core.training.health import HealthThresholds
from fewstep.evaluation.curves import Curve
from fewstep.evaluation.figures import curves_figure
from fewstep.evaluation.pages import png_uri, render_page
from fewstep.evaluation.provenance import Provenance
from fewstep.evaluation.runs.read import NO_SETTINGS, TrainingRun, differing_settings
from fewstep.evaluation.samples.atomic import write_text
from fewstep.evaluation.table import Table

PANELS, WIDEST_GRID = 12, 2000
LIMITS = HealthThresholds()
# What a metric does in a run that goes well, in the order in which panels are shown; names by their beginnings.
HEALTHY: dict[str, str] = {
    "validation_": "moves the way it should, by less than its noise at the end; where it turns, take the best weights",
    "student_loss": "of DMD no measure of quality: its gradient is what counts, and it settles at any level",
    "consistency_loss": "falls fast, then slowly; its level depends on weights and times: compare within one recipe",
    "fake_score_loss": "settles within some hundred steps; a slow rise means that it lags behind the student",
    "matching_direction_rms": f"stays below {LIMITS.direction_growth:g} times its start: above, the student leaves",
    "matching_student_std": f"{LIMITS.std_low:g} to {LIMITS.std_high:g} times the teacher's: below, samples flatten",
    "matching_student_mean": f"within {LIMITS.mean_shift:g} deviations of that of the teacher's samples",
    "discriminator_loss": "stays away from 0: at 0 the student has no gradient from it any more",
    "student_gan_loss": "about level with the discriminator's; a steady rise is a discriminator that has won",
    "reward": "rises while held-out scorers rise with it; alone it is being pleased",
    "held_out": "rises with the reward; a fall is a reward that is pleased and not met",
    "student_grad_norm": f"even, with spikes below {LIMITS.grad_norm_spike:g} times what is usual",
    "fake_grad_norm": f"even, with spikes below {LIMITS.grad_norm_spike:g} times what is usual",
    "seconds_per_step": "flat; a slope is memory that fills, or a disk that slows",
}


@dataclass(frozen=True)
class RunPicture:
    """A PNG inside the page and what it shows."""

    caption: str
    data_uri: str


@dataclass(frozen=True)
class RunContent:
    """All that the page shows."""

    title: str
    headline: tuple[str, ...]
    curves: RunPicture | None
    left_out: tuple[str, ...]
    healthy: Table
    told: tuple[tuple[str, tuple[str, ...]], ...]
    grids: tuple[RunPicture, ...]
    differences: Table | None
    settings: Table
    provenance: Provenance


def run_content(runs: Sequence[TrainingRun], provenance: Provenance) -> RunContent:
    """What a page of these runs shows. Raises ValueError for none, and for two of one name."""
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"runs are {names}; give at least one, and each a name of its own: NAME=DIR")
    metrics, left_out = shown_metrics(runs)
    named = [Curve(run.name, one.metric, one.steps, one.values) for run in runs for one in run.curves]
    plotted = RunPicture("Metrics over steps", png_uri(curves_figure(named, metrics=metrics))) if metrics else None
    rows, before = [], None
    for metric in metrics:
        key = healthy_key(metric)
        if key is not None:
            rows.append((metric, *(_last(run, metric) for run in runs), "the same" if key == before else HEALTHY[key]))
        before = key
    first = Table(("metric", *(f"now, {name}" for name in names), "in a run that goes well"), tuple(rows))
    settings = [name for name in dict.fromkeys(n for run in runs for n in run.settings) if name not in NO_SETTINGS]
    all_rows = tuple((name, *(_value(run, name) for run in runs)) for name in settings)
    differing = differing_settings(runs)
    return RunContent(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}",
        headline=tuple(headline_of(run) for run in runs),
        curves=plotted,
        left_out=tuple(left_out),
        healthy=first,
        told=tuple((run.name, tuple(f"step {one.step}: {one.text}" for one in run.health)) for run in runs),
        grids=tuple(
            RunPicture(f"{run.name}, step {step}", _grid_uri(path)) for run in runs for step, path in run.grids
        ),
        differences=Table(("setting", *names), tuple((name, *values) for name, values in differing))
        if differing
        else None,
        settings=Table(("setting", *names), all_rows),
        provenance=provenance,
    )


def headline_of(run: TrainingRun) -> str:
    """Where a run stands, in a line."""
    total = run.settings.get("run.steps")
    text = f"{run.name}: step {run.step} of {total}"
    seconds = run.last("seconds_per_step")
    if seconds is not None and math.isfinite(seconds):
        text += f", {seconds:.3g} s a step"
    if run.best is not None:
        step, figure, value = run.best
        text += f"; best {figure} {value:.4g} at step {step}"
    if run.damaged:
        text += "; best weights cannot be read"
    count = len(run.health)
    return f"{text}; {count or 'no'} health message{'' if count == 1 else 's'}"


def shown_metrics(runs: Sequence[TrainingRun]) -> tuple[list[str], list[str]]:
    """Up to `PANELS` metrics with at least two finite points, those of `HEALTHY` first, and the names left out."""
    names = list(
        dict.fromkeys(
            curve.metric
            for run in runs
            for curve in run.curves
            if sum(math.isfinite(value) for value in curve.values) > 1
        )
    )
    order = list(HEALTHY)

    def place(name: str) -> int:
        key = healthy_key(name)
        return len(order) if key is None else order.index(key)

    ranked = sorted(names, key=place)
    return ranked[:PANELS], ranked[PANELS:]


def healthy_key(metric: str) -> str | None:
    """The beginning of `HEALTHY` that a metric has, None where nothing general can be said of it."""
    return next((key for key in HEALTHY if metric.startswith(key)), None)


def write_run_page(folder: str | Path, runs: Sequence[TrainingRun], provenance: Provenance) -> Path:
    """Write runs.html, one file without outside resources, and runs.json into a folder; returns the page.

    Raises ValueError for a file in its place, and as `run_content`.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; name a folder for the page")
    content = run_content(runs, provenance)
    target.mkdir(parents=True, exist_ok=True)
    data = {
        "runs": {
            run.name: {
                "step": run.step,
                "best": run.best,
                "health": [{"step": one.step, "text": one.text} for one in run.health],
                "last": {curve.metric: _finite(curve.values[-1]) for curve in run.curves},
            }
            for run in runs
        },
        "differences": dict(differing_settings(runs)),
    }
    write_text(target / "runs.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    page = target / "runs.html"
    write_text(page, render_page("runs.html", content))
    return page


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _last(run: TrainingRun, metric: str) -> str:
    value = run.last(metric)
    return "-" if value is None else f"{value:.4g}"


def _value(run: TrainingRun, name: str) -> str:
    return str(run.settings[name]) if name in run.settings else "-"


def _grid_uri(path: Path) -> str:
    """A grid no wider than a page shows it."""
    with Image.open(path) as picture:
        if picture.width <= WIDEST_GRID:
            return png_uri(path.read_bytes())
        size = (WIDEST_GRID, round(picture.height * WIDEST_GRID / picture.width))
        stream = io.BytesIO()
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(stream, format="PNG")
    return png_uri(stream.getvalue())
