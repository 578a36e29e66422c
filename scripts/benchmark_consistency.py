"""Three seeds of each consistency method at 1, 2 and 4 steps, two methods up to 32, as in assets/benchmarks.

Runs that have exports are not trained again, and only missing exports are made: it goes on where it stopped.
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

    from studies import consistency as study
    from studies.two_time import write_results

    folder, output, methods = Path(options.runs), Path(options.output), options.methods or study.METHODS
    for seed in options.seeds:
        for method in methods:
            study.train_and_export(folder, method, seed=seed)
    if options.train_only:
        return
    study.evaluate(folder, methods, options.seeds, samples=options.samples, output=output)
    for method in set(methods) & set(study.NOT_EXPORTED):
        runs = [study.run_directory(folder, method, seed) for seed in options.seeds]
        print(write_results(runs, study.steps_of(method), name=method, samples=options.samples, output=output))


if __name__ == "__main__":
    main()
