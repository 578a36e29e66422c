"""What a run directory tells of its training: settings, curves, what it said, and its first and last samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.core.training.best import best_checkpoint
from fewstep.core.training.checkpoint import list_checkpoints, verify_checkpoint
from fewstep.core.training.run_directory import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, read_metrics
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
    `best` is (step, figure, value) of the best weights of a validation, None without one.
    """

    name: str
    settings: dict[str, Any]
    curves: tuple[Curve, ...]
    health: tuple[Told, ...]
    grids: tuple[tuple[int, Path], ...]
    environment: dict[str, Any]
    last_checkpoint: int | None
    best: tuple[int, str, float] | None

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
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{config} holds no settings ({error})") from error
    curves = tuple(read_curves(folder))
    environment = folder / ENVIRONMENT_FILE
    grids = sorted((int(path.stem.rpartition("-")[2]), path) for path in folder.glob("samples/step-*.png"))
    checkpoints, best = list_checkpoints(folder), best_checkpoint(folder)
    found = None
    if best is not None:
        state = verify_checkpoint(best)["state"]
        found = (_step_of(best), str(state["figure"]), float(state["value"]))
    return TrainingRun(
        name=name or folder.resolve().name,
        settings=settings,
        curves=curves,
        health=tuple(_health(metrics)),
        grids=tuple(dict.fromkeys((grids[0], grids[-1]))) if grids else (),
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {},
        last_checkpoint=_step_of(checkpoints[-1]) if checkpoints else None,
        best=found,
    )


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
    lines = metrics.read_text(encoding="utf-8")
    # A run that goes on may be in the middle of a line, which `read_metrics` does not forgive.
    whole = lines if lines.endswith("\n") else lines[: lines.rfind("\n") + 1]
    records = [json.loads(line) for line in whole.splitlines()] if whole != lines else read_metrics(metrics)
    texts = [(record["step"], record["note"]) for record in records if isinstance(record.get("note"), str)]
    return [Told(step, text.removeprefix(HEALTH)) for step, text in texts if text.startswith(HEALTH)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
