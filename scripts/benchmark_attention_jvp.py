"""Check, time and record attention with tangents beside torch's own, in assets/benchmarks/."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--masks", nargs="+", default=None, help="default: all")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, nargs="+", default=[64], help="of a head")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each row, in turns")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--dense_limit", type=int, default=8192, help="largest number of tokens for torch's dense tangent"
    )
    parser.add_argument(
        "--flex", action="store_true", help="add compiled FlexAttention (needs a C++ compiler on a CPU)"
    )
    parser.add_argument("--output", default=None, help="default: assets/benchmarks/attention_jvp_<device>.json")
    options = parser.parse_args()

    import torch
    from studies.attention_speed import MASKS, Case, measure, record_of, table_of

    from fewstep.evaluation.provenance import collect_provenance

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    results = []
    for tokens, width, mask in product(options.tokens, options.width, options.masks or MASKS):
        case = Case(tokens, mask, heads=options.heads, width=width, dtype=dtype, device=options.device)
        dense = tokens <= options.dense_limit
        result = measure(case, rounds=options.rounds, dense_jvp=dense, flex=options.flex, memory=True)
        results.append(result)
        print(table_of([result], heading=len(results) == 1), flush=True)
    made = collect_provenance("scripts/benchmark_attention_jvp.py", arguments=sys.argv[1:], device=options.device)
    output = Path(options.output or f"assets/benchmarks/attention_jvp_{torch.device(options.device).type}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"results": record_of(results), "provenance": asdict(made)}, indent=1) + "\n", "utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
