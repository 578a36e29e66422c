"""Where each reward method comes to rest on Gaussians, beside its closed form: assets/benchmarks/reward_toy.json."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--output", default="assets/benchmarks/reward_toy.json")
    options = parser.parse_args()

    import torch
    from studies.reward_toy import Method, ToyReward, run_reward_toy

    from fewstep.evaluation.provenance import collect_provenance

    torch.set_num_threads(1)
    rewards = {"linear": ToyReward(0.5), "curved": ToyReward(0.5, 0.3)}
    rows = []
    for method in Method.__args__:
        for name, reward in rewards.items():
            found = run_reward_toy(method, reward=reward, updates=options.updates)
            rows.append({"reward": name, **asdict(found)})
            print(
                f"{method} {name}, lambda {found.tilt_scale:.2f}: mean {found.mean:.3f} [{found.target_mean:.3f}], "
                f"std {found.std:.3f} [{found.target_std:.3f}]",
                flush=True,
            )
    made = collect_provenance("scripts/benchmark_reward_toy.py", arguments=sys.argv[1:])
    record = {"rewards": {name: asdict(reward) for name, reward in rewards.items()}, "rows": rows}
    text = json.dumps({**record, "provenance": asdict(made)}, indent=1)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
