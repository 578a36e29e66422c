"""Three seeds of 1-, 2- and 4-step students beside the teacher: the table in assets/benchmarks/digits_dmd.

Runs that are already exported are kept, so an interrupted benchmark goes on where it stopped.
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/benchmark_digits", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=2000, help="images per row and seed")
    parser.add_argument("--output", default="assets/benchmarks/digits_dmd")
    options = parser.parse_args()

    from studies.dmd import STUDENT_STEPS, evaluate, train_and_export

    for seed in options.seeds:
        for steps in STUDENT_STEPS:
            train_and_export(Path(options.runs), steps, seed=seed)
    evaluate(Path(options.runs), options.seeds, samples=options.samples, repeats=5, output=Path(options.output))


if __name__ == "__main__":
    main()
