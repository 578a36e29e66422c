"""Registers and stack of the attention kernels' first candidates on GPUs that need not be there.

    python scripts/studies/kernel_registers.py --output assets/benchmarks/kernel_registers.json

Compiled by Triton's own assembler; a stack above 0 bytes is what did not fit the 255 registers of a thread. Rows named
"earlier" are candidates that stood first before.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fewstep.kernels.attention_launch_triton import ACTIVE, CONSTANT, KEYS, PLAIN
from fewstep.kernels.tuning.choice_triton import TuneKey, candidates
from fewstep.kernels.tuning.registers_triton import usage_of
from fewstep.kernels.tuning.table import Kind, TileConfig

CAPABILITIES = (80, 89, 90)
KINDS: tuple[Kind, ...] = ("forward", "jvp", "dq", "dkdv")
ROLES = {"plain": PLAIN, "active": ACTIVE, "constant": CONSTANT, "keys": KEYS}
# Under a mask that promises nothing, with a key bias.
BIASED = "key bias"
HEADS = ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32), (128, torch.float32))
EARLIER: tuple[tuple[Kind, int, int, tuple[int, int, int, int]], ...] = (
    ("jvp", 80, 128, (128, 32, 8, 1)),
    ("jvp", 80, 128, (64, 32, 4, 2)),
    ("jvp", 89, 128, (128, 32, 8, 1)),
    ("jvp", 90, 256, (64, 16, 8, 2)),
    ("forward", 80, 128, (128, 64, 8, 2)),
    ("dkdv", 80, 64, (32, 64, 4, 2)),
)


def row(kind: Kind, capability: int, width: int, dtype: torch.dtype, role: str, tiles: TileConfig) -> dict[str, Any]:
    """One compiled kernel, under a mask with partial tiles."""
    how = {"role": ROLES.get(role, PLAIN), "biased": role == BIASED}
    usage = usage_of(kind, capability, tiles, width=width, dtype=dtype, **how)
    name = str(dtype).removeprefix("torch.")
    case = {"kernel": kind, "capability": capability, "width": width, "dtype": name, "role": role}
    return {**case, "tiles": asdict(tiles), **asdict(usage)}


def main() -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="file to write, .json")
    options = parser.parse_args()
    rows = []
    for capability in CAPABILITIES:
        for kind in KINDS:
            for width, dtype in HEADS:
                roles = tuple(ROLES) if kind == "jvp" and dtype == torch.bfloat16 else ("plain",)
                for role in (*roles, BIASED) if dtype == torch.bfloat16 else roles:
                    promises = role not in ("plain", BIASED)
                    key = TuneKey(kind, divmod(capability, 10), width, width, dtype, (True, promises))
                    rows.append(row(kind, capability, width, dtype, role, candidates(key)[0]))
                    print(rows[-1], flush=True)
    earlier = [
        row(kind, capability, width, torch.bfloat16, "plain", TileConfig(*tiles))
        for kind, capability, width, tiles in EARLIER
    ]
    record = {
        "command": f"python scripts/studies/kernel_registers.py --output {options.output}",
        "versions": {library: version(library) for library in ("torch", "triton")},
        "rows": rows,
        "earlier": earlier,
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
