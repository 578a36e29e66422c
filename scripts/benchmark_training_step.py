"""Record what a DMD training step costs beside its bare network calls, in assets/benchmarks/."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/dmd/digits_1step.yaml")
    parser.add_argument("--rounds", type=int, default=15, help="timed cycles, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", default="assets/benchmarks/training_step.json")
    options = parser.parse_args()

    import torch

    from fewstep.core.config import load_config
    from fewstep.dmd.benchmark import measure_step_cost
    from fewstep.dmd.config import DmdConfig
    from fewstep.evaluation.provenance import collect_provenance

    torch.set_num_threads(options.threads)
    config, _ = load_config(DmdConfig, ["--config", options.config], prog="benchmark", description="")
    cost = measure_step_cost(config, rounds=options.rounds)
    made = collect_provenance("scripts/benchmark_training_step.py", arguments=sys.argv[1:])
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    record = {**asdict(cost), "provenance": asdict(made)}
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"loop {cost.loop_seconds:.3f} s, network calls {cost.calls_seconds:.3f} s per cycle, ratio {cost.ratio:.3f}")
    print(f"peak memory {cost.memory}; wrote {options.output}")


if __name__ == "__main__":
    main()
