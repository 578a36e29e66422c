"""Steered students of the embedded video teacher over seeds: how they follow actions, as in assets/benchmarks. Runs
that are finished are not trained again; an interrupted one goes on.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/benchmark_causal_video", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=80, help="short videos per row and seed, of long ones a third")
    parser.add_argument("--output", default="assets/benchmarks/digits_steered")
    parser.add_argument("--train_only", action="store_true", help="leave out the evaluation")
    options = parser.parse_args()

    from studies import steered as study

    folder, output = Path(options.runs), Path(options.output)
    if options.train_only:
        study.prepare_data()
        for seed in options.seeds:
            study.train_steered(folder, seed)
        return
    study.run_study(folder, options.seeds, samples=options.samples, output=output, command=sys.argv)


if __name__ == "__main__":
    main()
