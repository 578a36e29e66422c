"""Causal students of the embedded video teacher over seeds: chains of stages at several schedules, sinks on long
streams, as in assets/benchmarks. Runs that are finished are not trained again, rows that are judged (RUNS/judged) are
not judged again; what was interrupted goes on.
"""

import argparse
import sys
from pathlib import Path

CHAINS = ("ode", "scm", "dcm", "astrolabe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--chains", nargs="+", default=CHAINS, choices=CHAINS)
    parser.add_argument("--runs", default="runs/benchmark_causal_video", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=80, help="videos per row and seed")
    parser.add_argument("--reference", default="test", choices=["train", "test"], help="split of the real clips")
    parser.add_argument("--guidance", type=float, default=2.0, help="of the teacher's row, as in training")
    parser.add_argument("--output", default="assets/benchmarks/digits_causal_video")
    parser.add_argument("--train_only", action="store_true", help="leave out the evaluation")
    options = parser.parse_args()

    from studies import causal as study

    folder = Path(options.runs)
    for seed in options.seeds:
        for chain in options.chains:
            study.train_chain(folder, chain, seed=seed)
    if options.train_only:
        return
    judge = study.StudyJudge.load(options.reference, samples=options.samples, kept=folder / "judged")
    rows = [study.judge_teacher(judge, guidance=options.guidance)]
    for chain in options.chains:
        for seed in options.seeds:
            rows += study.judge_seed(folder, chain, seed, judge)
    # Chains share their first runs.
    unique = {(row.system, row.seed, row.schedule, row.sink, row.latent_frames): row for row in rows}
    study.write_table(list(unique.values()), Path(options.output), command=sys.argv)


if __name__ == "__main__":
    main()
