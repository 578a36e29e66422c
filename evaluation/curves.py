"""Training curves out of run directories: metrics.jsonl holds one JSON object with "step" and metrics per line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
# What stands in a record beside metrics.
NOT_METRICS = {"step", "time", "seconds", "timestamp"}
# JSON has no such numbers, so run directories write them as words; a plot shows them as gaps.
NOT_FINITE = {"nan", "inf", "-inf"}


@dataclass(frozen=True)
class Curve:
    """One metric of one run over its steps."""

    run: str
    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_curves(run_directory: str | Path) -> list[Curve]:
    """All numeric metrics of a run, in the order in which they first appear.

    A resumed run repeats steps: the later record counts. Raises ValueError when there is no metrics file, or for a line
    that is no JSON object with a step (a last line that was cut off in writing is left out).
    """
    folder = Path(run_directory)
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {METRICS_FILE}; give the run directory of a training")
    lines = path.read_text(encoding="utf-8").split("\n")
    points: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            # Every whole line ends in a newline, so only a line that is still being written is last.
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is no JSON object with a step: {line[:60]!r}") from error
        for name, value in record.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name not in NOT_METRICS and (is_number or (isinstance(value, str) and value in NOT_FINITE)):
                points.setdefault(name, {})[step] = float(value)
    return [
        Curve(folder.name, name, tuple(sorted(values)), tuple(values[step] for step in sorted(values)))
        for name, values in points.items()
    ]


def choose_metrics(curves: Sequence[Curve], *, limit: int = 9) -> list[str]:
    """Up to `limit` names of metrics with at least two finite points, losses first, else in order of appearance."""
    names = list(
        dict.fromkeys(curve.metric for curve in curves if sum(math.isfinite(value) for value in curve.values) > 1)
    )
    return sorted(names, key=lambda name: "loss" not in name.lower())[:limit]
