"""What a run directory tells of its training: settings, curves, what it said, and its first and last samples."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fewstep.core.training.best import best_checkpoint
from fewstep.core.training.checkpoint import list_checkpoints, verify_checkpoint
from fewstep.core.training.run_directory import CONFIG_FILE, METRICS_FILE, sample_grids
from fewstep.evaluation.curves import Curve, read_curves

HEALTH = "health: "
# Where a run is written says nothing of what it did.
NO_SETTINGS = ("run.directory", "run.resume", "run.dry_run")


@dataclass(frozen=True)
class Told:
    """One note of a run, and the step that it is of."""

    step: int
    text: str


@dataclass(frozen=True)
class TrainingRun:
    """A run as its folder has it.

    `settings` are those of config.yaml by dotted names. `grids` are the first and the last grid of samples, by step.
    `best` is (step, figure, value) of the best weights of a validation, None without one; `damaged` tells that they
    cannot be read.
    """

    name: str
    settings: dict[str, Any]
    curves: tuple[Curve, ...]
    health: tuple[Told, ...]
    grids: tuple[tuple[int, Path], ...]
    last_checkpoint: int | None
    best: tuple[int, str, float] | None
    damaged: bool = False

    @property
    def step(self) -> int:
        """The last step with a record."""
        return max((curve.steps[-1] for curve in self.curves), default=0)

    def last(self, metric: str) -> float | None:
        """The latest value of a metric, None where it was not measured."""
        return next((curve.values[-1] for curve in self.curves if curve.metric == metric), None)


def read_run(folder: str | Path, *, name: str | None = None) -> TrainingRun:
    """Read a run directory, also of a run that goes on.

    Raises:
        ValueError: it is no run directory, or a file of it cannot be read.
    """
    folder = Path(folder)
    config, metrics = folder / CONFIG_FILE, folder / METRICS_FILE
    if not config.is_file() or not metrics.is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE} and {METRICS_FILE}; give the run directory of a training")
    try:
        settings = flat(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} holds no settings ({error})") from error
    try:
        curves, told = tuple(read_curves(folder)), tuple(_health(metrics))
    except UnicodeDecodeError as error:
        raise ValueError(f"{metrics} is no text ({error})") from error
    best, damaged = _best(folder)
    checkpoints = list_checkpoints(folder)
    return TrainingRun(
        name=name or folder.resolve().name,
        settings=settings,
        curves=curves,
        health=told,
        grids=_first_and_last(folder),
        last_checkpoint=_step_of(checkpoints[-1]) if checkpoints else None,
        best=best,
        damaged=damaged,
    )


def _best(folder: Path) -> tuple[tuple[int, str, float] | None, bool]:
    """The best weights of a validation, and whether they are damaged."""
    try:
        best = best_checkpoint(folder)
    except ValueError:
        return None, True
    if best is None:
        return None, False
    state = verify_checkpoint(best)["state"]
    return (_step_of(best), str(state["figure"]), float(state["value"])), False


def _first_and_last(folder: Path) -> tuple[tuple[int, Path], ...]:
    """The first and the last grid that can be read; other pictures beside them count for nothing."""
    found = []
    for step, path in sample_grids(folder):
        with contextlib.suppress(OSError):
            with Image.open(path) as picture:
                picture.verify()
            found.append((step, path))
    return tuple(dict.fromkeys((found[0], found[-1]))) if found else ()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; a list counts as one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differing_settings(runs: Sequence[TrainingRun]) -> list[tuple[str, tuple[str, ...]]]:
    """Names whose values differ between runs, and each run's; "-" where a run has no such setting."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NO_SETTINGS)
    rows = []
    for name in names:
        shown = tuple(_shown(run.settings[name]) if name in run.settings else "-" for run in runs)
        if len(set(shown)) > 1:
            rows.append((name, shown))
    return rows


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict | str) else str(value)


def _health(metrics: Path) -> list[Told]:
    found = []
    # `read_curves` has read the file before: a line that is no record now is blank, or still being written.
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            note = record.get("note")
            if isinstance(note, str) and note.startswith(HEALTH):
                found.append(Told(int(record["step"]), note.removeprefix(HEALTH)))
    return found


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
