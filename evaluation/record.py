"""Puts measured figures into the exports they were measured on, when asked: `distillation.json` and the model card."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.export.model_card import add_figures
from fewstep.core.export.record import RECORD_FILE, Figure
from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.results import EvaluationResult, MeasureKind, Spread

DIRECTIONS = {True: " (lower is better)", False: " (higher is better)", None: ""}


def figures_of(results: tuple[EvaluationResult, ...], kinds: tuple[MeasureKind, ...], reference: str) -> list[Figure]:
    """The figures of one pipeline, medians over generation seeds, each with the setting that it holds for."""
    first, found = results[0], []
    seeds = ", ".join(str(result.seed) for result in results)
    drawn = f"{first.steps} steps, guidance {first.guidance:g}, {first.samples} images, seed {seeds}"
    for kind in kinds:
        values = [result.figures[kind.key].value for result in results if kind.key in result.figures]
        if not values:
            continue
        one = first.figures[kind.key]
        setting = [drawn, f"against {one.references} real images of {reference}" if one.references else "", one.source]
        if one.low is not None and one.high is not None and len(results) == 1:
            setting.append(f"95 % interval {one.low * kind.scale:.4g} to {one.high * kind.scale:.4g}")
        if one.floor is not None:
            setting.append(f"real images {one.floor * kind.scale:.4g}")
        setting += one.warnings
        value = round(Spread.of(values).median * kind.scale, 4)
        found.append(Figure(kind.title + DIRECTIONS[kind.lower_is_better], value, "; ".join(filter(None, setting))))
    return found


def record_figures(comparison: Comparison) -> list[str]:
    """Write the figures into every judged directory that is an export of this project; returns these directories."""
    written = []
    for system, results in comparison.measured:
        if (Path(system.path) / RECORD_FILE).is_file():
            add_figures(system.path, figures_of(results, comparison.kinds, comparison.reference))
            written.append(system.path)
    return written
