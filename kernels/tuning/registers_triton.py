"""Registers and stack of the Triton attention kernels on a GPU that need not be there, from Triton's own assembler.

A kernel that holds more than the 255 registers of a thread keeps the rest on its stack, in memory, which it reads and
writes for every tile: the first candidates of `tuning.choice_triton` have a stack of 0 bytes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fewstep.kernels.attention_backward_triton import dkdv_kernel, dq_kernel
from fewstep.kernels.attention_jvp_triton import forward_kernel
from fewstep.kernels.attention_launch_triton import LENGTHS, PLAIN, padded
from fewstep.kernels.tuning.table import Kind, TileConfig

POINTER_TYPES = {
    "*fp32": {"LSE", "DELTA", "MEAN", "BIAS"},
    "*i32": {"INTERVALS", "ROW_PTR", "ROW_TILES", "ROW_ORDER", "COLUMN_PTR", "COLUMN_TILES", "COLUMN_ORDER", "LISTED"},
}
ELEMENTS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Under a mask of two ranges for each query, the most that masks of this package need.
RANGES = 2


@dataclass(frozen=True)
class Usage:
    """What a program takes on the chip.

    Attributes:
        registers: of a thread, at most 255.
        stack: bytes of a thread that did not fit.
        shared: bytes of a program.
        products: instructions of the matrix units.
        full_waits: of them, how often all those under way are waited for (Hopper).
        copies: whether loads of later tiles are under way meanwhile.
    """

    registers: int
    stack: int
    shared: int
    products: int
    full_waits: int
    copies: bool


def usage_of(
    kind: Kind,
    capability: int,
    config: TileConfig,
    *,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    masked: bool = True,
    role: int = PLAIN,
    biased: bool = False,
) -> Usage:
    """Compile a kernel with all its tangents; lengths are plain numbers, all else is aligned.

    Args:
        kind: "forward", "jvp", "dq" or "dkdv".
        capability: 80, 86, 89, 90.
        config: its tiles.
        width: of heads, queries, keys and values alike.
        dtype: of them.
        masked: some tile is partial.
        role: of `attention_launch_triton`, for "jvp".
        biased: keys have a bias.

    Raises what the compiler does for tiles that it refuses.
    """
    kernel: Any = {"dq": dq_kernel, "dkdv": dkdv_kernel}.get(kind, forward_kernel)
    constants = {"D": width, "E": width, "D_PAD": padded(width), "E_PAD": padded(width), "RANGES": RANGES}
    constants |= {"BM": config.query_tile, "BN": config.key_tile, "UPCAST": False, "MASKED": masked}
    constants["BIASED"] = biased
    if kind in ("forward", "jvp"):
        constants |= {f"HAS_T{letter}": kind == "jvp" for letter in "QKV"} | {"EARLY": config.early, "ROLE": role}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in LENGTHS or name.startswith("scale"):
            signature[name] = "i32" if name in LENGTHS else "fp32"
        else:
            types = [pointer for pointer, names in POINTER_TYPES.items() if name in names]
            signature[name] = (types or [ELEMENTS[dtype] if name.isupper() else "i32"])[0]
            aligned[(place,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx, found = compiled.asm["ptx"], resources(compiled.asm["cubin"])
    return Usage(
        found["REG"],
        found["STACK"],
        compiled.metadata.shared,
        len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        len(re.findall(r"wgmma\.wait_group\.sync\.aligned\s+0;", ptx)),
        "async_copy_global" in compiled.asm["ttgir"],
    )


def resources(binary: bytes) -> dict[str, int]:
    """What the tool that comes with Triton says of a compiled program: REG, STACK and others."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED):(\d+)", said.stdout)}
