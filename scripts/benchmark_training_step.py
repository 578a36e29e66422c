"""Record what a training step of DMD or sCM costs beside its bare network calls, in assets/benchmarks/."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

CONFIGS = {"dmd": "configs/digits/dmd_1step.yaml", "scm": "configs/digits/scm.yaml"}
OUTPUTS = {"dmd": "assets/benchmarks/training_step.json", "scm": "assets/benchmarks/training_step_scm.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=sorted(CONFIGS), default="dmd")
    parser.add_argument("--config", default=None, help="default: the method's own on the digits")
    parser.add_argument("--rounds", type=int, default=15, help="timed cycles, after one of warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", default=None, help="default: assets/benchmarks/training_step*.json")
    options = parser.parse_args()

    import torch
    from studies.scm_step_cost import measure_scm_step
    from studies.step_cost import measure_step_cost

    from fewstep.consistency.config import ConsistencyConfig
    from fewstep.core.config import load_config
    from fewstep.dmd.config import DmdConfig
    from fewstep.evaluation.provenance import collect_provenance

    torch.set_num_threads(options.threads)
    arguments = ["--config", options.config or CONFIGS[options.method]]
    if options.method == "dmd":
        cost = measure_step_cost(
            load_config(DmdConfig, arguments, prog="benchmark", description="")[0], rounds=options.rounds
        )
    else:
        config, _ = load_config(ConsistencyConfig, arguments, prog="benchmark", description="")
        cost = measure_scm_step(config, rounds=options.rounds)
    made = collect_provenance("scripts/benchmark_training_step.py", arguments=sys.argv[1:])
    output = Path(options.output or OUTPUTS[options.method])
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {**asdict(cost), "provenance": asdict(made)}
    output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"loop {cost.loop_seconds:.3f} s, network calls {cost.calls_seconds:.3f} s per cycle, ratio {cost.ratio:.3f}")
    print(f"peak memory {cost.memory}; wrote {output}")


if __name__ == "__main__":
    main()
