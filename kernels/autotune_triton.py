"""Tiles of the Triton attention kernels: a table of candidates per GPU, and their measurement on the first call.

A key never holds a length, so a program with many lengths measures once. FEWSTEP_ATTENTION_AUTOTUNE=0 and
torch.use_deterministic_algorithms(True) take the first candidate instead: tiles decide the order of sums, so a measured
winner may differ between two runs of one program, and with it the last bits of the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.testing
from triton import knobs

SWITCH = "FEWSTEP_ATTENTION_AUTOTUNE"
# Milliseconds of launches per candidate, before and while it is measured.
WARMUP_MS = 10
MEASURE_MS = 40

Kind = Literal["forward", "jvp", "dq", "dkdv"]


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys of a tile (powers of two from 16), warps of a program, stages of the software pipeline."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TuneKey:
    """What the best tiles depend on.

    `capability` is CUDA's (9, 0) for Hopper. `flags` are the compile-time switches of the kernel: which tangents there
    are, whether the mask has partial tiles, whether it promises zero tangents.
    """

    kind: Kind
    capability: tuple[int, int]
    width: int
    value_width: int
    dtype: torch.dtype
    flags: tuple[bool, ...]


# Rectangular, so that an exchange of the two sides shows in tests.
INTERPRETER_CONFIG = TileConfig(32, 16, 4, 1)

_winners: dict[TuneKey, TileConfig] = {}
_fitting: dict[TuneKey, TileConfig] = {}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on tensors of the CPU."""
    return knobs.runtime.interpret


def measures() -> bool:
    """Whether candidates are measured.

    Raises:
        ValueError: the variable FEWSTEP_ATTENTION_AUTOTUNE is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH}={switch!r}; set it to 1 (measure tiles on the first call, the default) or 0.")
    # A stream that is being captured runs nothing, so there is nothing to measure.
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return switch == "1" and not capturing and not torch.are_deterministic_algorithms_enabled()


def choose(key: TuneKey, launch: Callable[[TileConfig], None]) -> TileConfig:
    """Tiles for a kernel: the fastest of the candidates on this call's tensors, kept for the life of the process.

    Args:
        key: what the choice depends on.
        launch: runs the kernel with given tiles; it is called several times and must give the same results each time.

    Raises:
        ValueError: the GPU is older than the kernels' oldest, or has too little memory on chip for every candidate.
    """
    if interpreting():
        return INTERPRETER_CONFIG
    if not measures():
        return first_that_fits(key, launch)
    winner = _winners.get(key)
    if winner is None:
        winner = _winners[key] = measure(key, launch)
    return winner


def forget() -> None:
    """Drop what was measured, so that the next calls measure again."""
    _winners.clear()
    _fitting.clear()


def first_that_fits(key: TuneKey, launch: Callable[[TileConfig], None]) -> TileConfig:
    """The first candidate that the GPU has the resources for."""
    if key not in _fitting:
        for config in candidates(key):
            try:
                launch(config)
            except triton.OutOfResources:
                continue
            _fitting[key] = config
            break
        else:
            raise none_fits(key)
    return _fitting[key]


def measure(key: TuneKey, launch: Callable[[TileConfig], None]) -> TileConfig:
    """The fastest candidate by the median time of a launch, those beyond the GPU's resources left out."""
    times: dict[TileConfig, float] = {}
    for config in candidates(key):
        try:
            launch(config)
        except triton.OutOfResources:
            continue
        time = triton.testing.do_bench(
            lambda config=config: launch(config), warmup=WARMUP_MS, rep=MEASURE_MS, return_mode="median"
        )
        assert isinstance(time, float)
        times[config] = time
    if len(times) == 0:
        raise none_fits(key)
    return min(times, key=lambda config: times[config])


def none_fits(key: TuneKey) -> ValueError:
    """The error for a GPU on which no candidate compiles."""
    return ValueError(
        f"No tile of the {key.kind} attention kernel fits heads of {key.width} and {key.value_width} in {key.dtype} on "
        f"a GPU of compute capability {key.capability[0]}.{key.capability[1]}. Use narrower heads, fp16 or bf16, or "
        "backend='tiled'."
    )


# "64", "128", "256": the power of two that holds the wider head; "exact": fp32 at any width, which matrix units would
# round. What is listed for fp16 and bf16 fits the memory on chip at the upper end of its width; wide fp32 heads need
# later entries on some GPUs. Tiles that keep their sums in registers come first.
Column = Literal["64", "128", "256", "exact"]
EXACT = ((32, 32, 4, 1), (32, 16, 4, 1), (16, 16, 4, 1))
TABLE: dict[tuple[str, Kind], dict[Column, tuple[tuple[int, int, int, int], ...]]] = {
    ("hopper", "forward"): {
        "64": ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
        "128": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2)),
        "256": ((64, 32, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
        "exact": EXACT,
    },
    ("hopper", "jvp"): {
        "64": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3)),
        "128": ((128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 4, 2)),
        "256": ((64, 16, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)),
        "exact": EXACT,
    },
    ("hopper", "dq"): {
        "64": ((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
        "128": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)),
        "256": ((64, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)),
        "exact": EXACT,
    },
    ("hopper", "dkdv"): {
        "64": ((64, 128, 8, 2), (64, 64, 4, 3), (32, 64, 4, 3)),
        "128": ((32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
        "256": ((32, 64, 8, 2), (32, 64, 8, 1)),
        "exact": EXACT,
    },
    ("ampere", "forward"): {
        "64": ((128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
        "128": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
        "256": ((64, 32, 8, 2), (64, 32, 4, 2)),
        "exact": EXACT,
    },
    ("ampere", "jvp"): {
        "64": ((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2)),
        "128": ((128, 32, 8, 1), (64, 32, 8, 2), (64, 32, 4, 2)),
        "256": ((32, 32, 8, 1), (32, 16, 4, 2), (32, 32, 4, 1)),
        "exact": EXACT,
    },
    ("ampere", "dq"): {
        "64": ((64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)),
        "128": ((64, 32, 4, 2), (64, 64, 4, 1)),
        "256": ((32, 32, 4, 1), (64, 32, 8, 1)),
        "exact": EXACT,
    },
    ("ampere", "dkdv"): {
        "64": ((32, 64, 4, 2), (64, 64, 4, 2)),
        "128": ((32, 64, 8, 2), (32, 64, 4, 2)),
        "256": ((32, 32, 8, 1), (16, 32, 8, 2), (32, 32, 4, 1)),
        "exact": EXACT,
    },
}


def candidates(key: TuneKey) -> tuple[TileConfig, ...]:
    """Tiles worth a try, the best guess first.

    Raises:
        ValueError: compute capability below 8.0.
    """
    if key.capability < (8, 0):
        raise ValueError(
            f"The Triton kernels need a GPU of compute capability 8.0 or newer and this one has "
            f"{key.capability[0]}.{key.capability[1]}; use backend='tiled'."
        )
    # On chip 227 KB on Hopper and the data centre's Blackwell; the rest of the table fits the 99 KB of all others.
    row = "hopper" if key.capability[0] in (9, 10) else "ampere"
    return tuple(TileConfig(*tiles) for tiles in TABLE[row, key.kind][column_of(key)])


def column_of(key: TuneKey) -> Column:
    """The column of the table for the heads and dtype of a key."""
    if key.dtype == torch.float32:
        return "exact"
    width = max(key.width, key.value_width)
    return "64" if width <= 64 else "128" if width <= 128 else "256"
