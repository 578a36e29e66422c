"""Three seeds of each consistency method at 1, 2 and 4 steps: the table in assets/benchmarks/digits_consistency.

Runs that are already exported are kept, so an interrupted benchmark goes on where it stopped.
"""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", default=None, help="default: all; others are not trained, and not shown"
    )
    parser.add_argument("--runs", default="runs/benchmark_consistency", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=2000, help="images per row and seed")
    parser.add_argument("--output", default="assets/benchmarks/digits_consistency")
    parser.add_argument("--train_only", action="store_true", help="leave out the evaluation")
    options = parser.parse_args()

    from fewstep.consistency.digits_study import METHODS, evaluate, train_and_export

    methods = options.methods or METHODS
    for seed in options.seeds:
        for method in methods:
            train_and_export(Path(options.runs), method, seed=seed)
    if not options.train_only:
        evaluate(Path(options.runs), methods, options.seeds, samples=options.samples, output=Path(options.output))


if __name__ == "__main__":
    main()
