"""Reward against quality on the digits for every method: assets/benchmarks/reward_digits; --overlap times slow scorers.

Runs that are complete and checkpoints that are judged are kept, so an interrupted study goes on where it stopped. The
distilled students are runs of configs/digits/dmd_2step.yaml in --base, named digits_2step_seedN.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="default: all, and the run that is to be hacked")
    parser.add_argument("--base", default="runs/reward_base", help="folder of the distilled students")
    parser.add_argument("--runs", default="runs/benchmark_reward", help="folder of the reward runs")
    parser.add_argument("--samples", type=int, default=1000, help="images per checkpoint")
    parser.add_argument("--reference", default="test", help="split of the real digits: test, or train for trials")
    parser.add_argument("--output", default="assets/benchmarks/reward_digits")
    parser.add_argument("--overlap", metavar="METHOD", help="time steps of this method with a scorer that waits")
    parser.add_argument("--scorer_seconds", type=float, default=0.3, help="with --overlap: how long it waits")
    parser.add_argument("--rounds", type=int, default=5, help="with --overlap: steps timed each way")
    options = parser.parse_args()

    from studies.reward import HACKING, METHODS, evaluate, run_directory, study_config, train, write_report

    from fewstep.evaluation.provenance import collect_provenance

    base, folder, output = Path(options.base), Path(options.runs), Path(options.output)
    made = asdict(collect_provenance("scripts/benchmark_reward.py", arguments=sys.argv[1:]))
    if options.overlap:
        from studies.reward_overlap import measure_overlap

        start = run_directory(base, 2, options.seeds[0])
        config = study_config(options.overlap, base=start, run=folder / "overlap", seed=0)
        cost = measure_overlap(config, seconds=options.scorer_seconds, rounds=options.rounds)
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**asdict(cost), "provenance": made}, indent=1)
        (output / f"overlap_{options.overlap}.json").write_text(text + "\n", encoding="utf-8")
        print(text)
        return
    methods = options.methods or [*METHODS, HACKING]
    for seed in options.seeds:
        for method in methods:
            train(folder, base, method, seed=seed)
    points = evaluate(folder, base, methods, options.seeds, samples=options.samples, reference=options.reference)
    write_report(points, output, provenance=made)


if __name__ == "__main__":
    main()
