"""Train consistency students of moving digits, export them, and judge them at 1, 2 and 4 steps beside their teacher.

Runs that have an export are not trained again: it goes on where it stopped.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=None, help="default: anyflow and mcm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/video_study"), help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=320, help="clips per row")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    from studies import consistency_video as study
    from studies.dmd import record_training

    methods, seeds, pictures = options.methods or study.METHODS, options.seeds, options.output / "figures"
    runs = {(name, seed): study.train_run(options.runs, name, seed=seed) for name in methods for seed in seeds}
    jury = study.load_jury(options.samples)
    rows = [study.judge_real(jury), *study.judge_teacher(jury, pictures)]
    for (name, seed), run in runs.items():
        rows += study.judge_run(run, name=name, seed=seed, jury=jury, sheets=pictures)
    command = ["scripts/benchmark_consistency_video.py", *sys.argv[1:]]
    study.write_table(rows, options.output, command=command)
    record_training(list(runs.values()), output=options.output)


if __name__ == "__main__":
    main()
