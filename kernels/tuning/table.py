"""Candidates of tiles for the Triton attention kernels, by GPU, kernel and heads.

The first of each list keeps all its numbers in registers (`registers_triton`; a test compiles them), so that it is a
safe choice where nothing is measured. Exceptions: heads of 128 with tangents on Ada, whose walk over partial tiles
keeps 16 bytes of a thread on its stack, and fp32 heads above 64. Later ones may hold a little there and win all the
same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "jvp", "dq", "dkdv"]
Row = Literal["hopper", "ampere", "ada"]


@dataclass(frozen=True)
class TileConfig:
    """Queries and keys of a tile (powers of two from 16), warps of a program, stages of the software pipeline; and in
    jvp kernels whether score tangents are taken before the scores."""

    query_tile: int
    key_tile: int
    warps: int
    stages: int
    early: bool = False


def of(*tiles: tuple[int, int, int, int]) -> tuple[TileConfig, ...]:
    """A list of candidates."""
    return tuple(TileConfig(*tile) for tile in tiles)


def early(*tiles: tuple[int, int, int, int]) -> tuple[TileConfig, ...]:
    """The same, score tangents first."""
    return tuple(TileConfig(*tile, early=True) for tile in tiles)


# "64", "128", "256": the power of two that holds the wider head; "exact" is fp32, in three products of halves. "roles":
# under a mask that promises zero tangents. On A100 and Ada a tile has at least as many queries as its heads are wide:
# with fewer, Triton 3.9 gives each warp all queries of the tile, and no candidate fits the registers.
EXACT: dict[Kind, dict[str, tuple[TileConfig, ...]]] = {
    "forward": {
        "exact 64": of((64, 16, 4, 2), (64, 32, 4, 1), (32, 16, 4, 1)),
        "exact 128": of((32, 16, 4, 1), (64, 16, 4, 2), (16, 16, 4, 1)),
        "exact 256": of((16, 16, 8, 1), (16, 16, 4, 1)),
    },
    "jvp": {
        "exact 64": of((16, 16, 4, 1), (32, 16, 4, 1), (32, 32, 4, 1)),
        "exact 128": of((16, 16, 8, 1), (16, 16, 4, 1)),
        "exact 256": of((16, 16, 4, 1), (16, 16, 8, 1)),
    },
    "dq": {
        "exact 64": of((32, 16, 4, 1), (16, 16, 4, 1)),
        "exact 128": of((16, 16, 4, 1), (32, 16, 4, 1)),
        "exact 256": of((16, 16, 8, 1), (16, 16, 4, 1)),
    },
    "dkdv": {
        "exact 64": of((16, 32, 4, 1), (16, 16, 4, 1)),
        "exact 128": of((16, 16, 4, 1), (16, 32, 4, 1)),
        "exact 256": of((16, 16, 8, 1), (16, 16, 4, 1)),
    },
}
HOPPER: dict[Kind, dict[str, tuple[TileConfig, ...]]] = {
    "forward": {
        "64": of((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
        "128": of((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2)),
        "256": of((64, 32, 8, 2), (64, 32, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
    },
    "jvp": {
        "64": of((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3)),
        "128": of((128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3), (64, 64, 4, 2)),
        "256": (*early((32, 16, 8, 2)), *of((64, 16, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2))),
    },
    "dq": {
        "64": of((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
        "128": of((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)),
        "256": of((64, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)),
    },
    "dkdv": {
        "64": of((64, 128, 8, 2), (64, 64, 4, 3), (32, 64, 4, 3)),
        "128": of((32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)),
        "256": of((64, 32, 8, 1), (32, 64, 8, 2), (32, 64, 8, 1)),
    },
}
AMPERE: dict[Kind, dict[str, tuple[TileConfig, ...]]] = {
    "forward": {
        "64": of((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2)),
        "128": of((128, 32, 8, 2), (128, 64, 8, 2), (128, 32, 8, 3)),
        "256": of((64, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 2)),
    },
    "jvp": {
        "64": of((128, 32, 8, 3), (128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2)),
        "128": early((128, 16, 8, 3), (128, 16, 8, 2), (128, 32, 8, 1)),
        "128 roles": early((128, 16, 8, 2), (128, 16, 8, 3), (128, 32, 8, 1)),
        "256": early((32, 16, 8, 2), (32, 16, 8, 1), (16, 16, 4, 1)),
    },
    "dq": {
        "64": of((128, 64, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)),
        "128": of((128, 32, 8, 2), (64, 32, 4, 2)),
        "256": of((64, 32, 8, 1), (32, 32, 4, 1)),
    },
    "dkdv": {
        "64": of((32, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
        "128": of((32, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2)),
        "256": of((32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 2)),
    },
}
# With less memory on chip, and the same registers: all of these fit 99 KB.
ADA = AMPERE
ROWS: dict[Row, dict[Kind, dict[str, tuple[TileConfig, ...]]]] = {"hopper": HOPPER, "ampere": AMPERE, "ada": ADA}
TABLE = {(row, kind): {**own, **EXACT[kind]} for row, kinds in ROWS.items() for kind, own in kinds.items()}
