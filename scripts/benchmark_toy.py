"""Every consistency and flow-map objective against the exact answer in one dimension: assets/benchmarks/toy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000, help="updates after the pretraining on the velocity")
    parser.add_argument("--objectives", nargs="+", default=None, help="default: all")
    parser.add_argument("--output", default="assets/benchmarks/toy")
    options = parser.parse_args()

    import torch
    from studies.consistency_toy import OBJECTIVES, ToySettings
    from studies.consistency_toy_study import run_study, table, write_study

    from fewstep.evaluation.provenance import collect_provenance

    # The network is too small for a second thread to help.
    torch.set_num_threads(1)
    settings = ToySettings(OBJECTIVES[0], steps=options.steps)
    rows, drawn = run_study(options.seeds, settings, options.objectives or OBJECTIVES)
    made = collect_provenance("scripts/benchmark_toy.py", arguments=sys.argv[1:])
    write_study(rows, drawn, settings=settings, made=made, output=Path(options.output))
    print(table(rows))


if __name__ == "__main__":
    main()
