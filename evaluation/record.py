"""Puts measured figures into the exports they were measured on: `distillation.json` and the model card."""

from __future__ import annotations

from pathlib import Path

from fewstep.core.export.model_card import RECORD_FILE, Figure, add_figures
from fewstep.evaluation.evaluate import Comparison
from fewstep.evaluation.results import EvaluationResult, Spread


def figures_of(results: tuple[EvaluationResult, ...]) -> list[Figure]:
    """The figures of one pipeline, medians over generation seeds, each with the setting that it holds for."""
    first = results[0]
    seeds = ", ".join(str(result.seed) for result in results)
    drawn = f"{first.steps} steps, guidance {first.guidance:g}, {first.samples} images, seed {seeds}"
    count, split = first.fid.reference_samples, first.fid.reference_split
    images = f"{count} images of {split}" if first.accuracy is None else f"{split} split of {count}"
    reference = f"{images}, {first.fid.feature_extractor}"

    def median(values: list[float]) -> float:
        return round(Spread.of(values).median, 4)

    figures = [
        Figure(
            "FID (lower is better)",
            median([result.fid.value for result in results]),
            f"{drawn}; {reference}; floor {first.fid.floor:.3f}",
        )
    ]
    accuracies = [result.accuracy for result in results if result.accuracy is not None]
    if accuracies:
        setting = f"{drawn}; real images {accuracies[0].reference:.3f}"
        figures.append(Figure("class accuracy (fraction)", median([one.value for one in accuracies]), setting))
    diversities = [result.diversity for result in results if result.diversity is not None]
    if diversities:
        setting = f"{drawn}; real images {diversities[0].reference:.3f}"
        figures.append(Figure("diversity within a class", median([one.value for one in diversities]), setting))
    return figures


def record_figures(comparison: Comparison) -> list[str]:
    """Write the figures into every judged directory that is an export of this project; returns these directories."""
    written = []
    for system, results in comparison.measured:
        if (Path(system.path) / RECORD_FILE).is_file():
            add_figures(system.path, figures_of(results))
            written.append(system.path)
    return written
