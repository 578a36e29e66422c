"""How often the intervals of paired differences hold the truth, on simulated evaluations whose truth is known.

python scripts/studies/interval_coverage.py writes assets/benchmarks/interval_coverage.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fewstep.evaluation.measures.frechet import distance_influences
from fewstep.evaluation.measures.kernel import kernel_inception_distance, kid_influences
from fewstep.evaluation.measures.resampling import Draws, Error, Population, paired_difference
from fewstep.evaluation.measures.statistics import feature_distance
from fewstep.evaluation.provenance import collect_provenance

SIZE, IMAGES, PICTURES = 16, 500, 500
# Shifts of the two systems' features from those of real pictures: far apart, near, equal, and both of the real law.
CASES = {"far": (0.4, 0.1), "near": (0.15, 0.1), "equal": (0.2, 0.2), "real": (0.0, 0.0)}
# Normal features, and features with the heavy tails of a cube.
LAWS = ("normal", "heavy tails")
TRUTH_SEED = 1_000_000

Measure = Callable[[Tensor, Tensor], float]


def simulated(law: str, shifts: tuple[float, float], seed: int) -> tuple[list[Tensor], Tensor]:
    """Features of two systems that share a part of their noise, and of real pictures."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        # Correlated along the features.
        normal = torch.randn(count, SIZE, generator=generator).cumsum(dim=1) / SIZE**0.5
        return normal if law == "normal" else normal + 0.3 * normal**3 / 3

    reference, shared = draw(PICTURES), draw(IMAGES)
    own = [draw(IMAGES) for _ in shifts]
    return [0.8 * shared + 0.6 * part + shift for part, shift in zip(own, shifts, strict=True)], reference


def errors_of(measure: str, side: Tensor, reference: Tensor, draws: Draws) -> Error:
    """The error of a measure as an evaluation has it."""
    influences = distance_influences if measure == "fid" else kid_influences
    return Error.of_distance(influences(side, reference), draws)


def coverage(
    measure: str, law: str, shifts: tuple[float, float], *, trials: int, truth_trials: int
) -> dict[str, float]:
    """The share of trials whose interval holds the truth, and how wide intervals are."""
    function: Measure = feature_distance if measure == "fid" else kernel_inception_distance
    truth = 0.0
    if shifts[0] != shifts[1]:
        found = (simulated(law, shifts, TRUTH_SEED + trial) for trial in range(truth_trials))
        truth = statistics.fmean(function(sides[0], real) - function(sides[1], real) for sides, real in found)
    hits, widths = 0, []
    for trial in tqdm(range(trials), desc=f"{measure} {law} {shifts}"):
        sides, reference = simulated(law, shifts, trial)
        draws = Draws(Population(IMAGES), Population(PICTURES), 0)
        values = [[function(side, reference)] for side in sides]
        errors = [[errors_of(measure, side, reference, draws)] for side in sides]
        found_difference = paired_difference(values[0], values[1], (errors[0], errors[1]))
        hits += found_difference.low <= truth <= found_difference.high
        widths.append(found_difference.high - found_difference.low)
    return {"share": hits / trials, "truth": truth, "median_width": statistics.median(widths), "trials": trials}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--truth_trials", type=int, default=4000)
    parser.add_argument("--output", default="assets/benchmarks/interval_coverage.json")
    options = parser.parse_args()
    found = {
        f"{measure}, {law}": {
            name: coverage(measure, law, shifts, trials=options.trials, truth_trials=options.truth_trials)
            for name, shifts in CASES.items()
        }
        for measure in ("fid", "kid")
        for law in LAWS
    }
    made = collect_provenance("scripts/studies/interval_coverage.py", arguments=sys.argv[1:])
    sizes = {"features": SIZE, "images": IMAGES, "references": PICTURES}
    content = {"sizes": sizes, "coverage": found, "provenance": {**asdict(made), "versions": dict(made.versions)}}
    Path(options.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
