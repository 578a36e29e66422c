"""Tiles of the Triton attention kernels: which of the candidates in `table` a call takes.

They are measured on the first call of a key, which holds classes of lengths and no length, so that a program with many
lengths measures a few times. Winners are kept in a file: the processes of a machine measure once between them, take the
same tiles, and the next run measures nothing. FEWSTEP_ATTENTION_AUTOTUNE=0 and torch.use_deterministic_algorithms(True)
take the first candidate instead: tiles decide the order of sums, so a measured winner may differ between two machines,
and with it the last bits of the results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.testing
from triton import knobs

from fewstep.kernels.tuning.table import TABLE, Kind, Row, TileConfig
from fewstep.kernels.tuning.winners import kept_winner

SWITCH = "FEWSTEP_ATTENTION_AUTOTUNE"
# Milliseconds of launches per candidate, before and while it is measured.
WARMUP_MS = 10
MEASURE_MS = 40

SIZES = (512, 4096)


@dataclass(frozen=True)
class TuneKey:
    """What the best tiles depend on.

    `capability` is CUDA's (9, 0) for Hopper. `flags` are the compile-time switches of the kernel: which tangents there
    are, whether the mask has partial tiles, whether it promises zero tangents. `size` are the classes of the numbers of
    queries and keys (`size_class`): tiles that win on a short text are not those of a long video.
    """

    kind: Kind
    capability: tuple[int, int]
    width: int
    value_width: int
    dtype: torch.dtype
    flags: tuple[bool, ...]
    size: tuple[int, int] = (0, 0)


def size_class(tokens: int) -> int:
    """0 up to 512 tokens, 1 up to 4,096, 2 above."""
    return sum(tokens > limit for limit in SIZES)


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
    """Tiles for a kernel: the fastest of the candidates on this call's tensors, kept for this and later processes.

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
        name = f"{torch.cuda.get_device_name()} | {key}"
        winner = _winners[key] = kept_winner(name, candidates(key), lambda: measure(key, launch))
    return winner


def forget() -> None:
    """Drop what this process knows, so that the next calls look again."""
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
    # On chip 227 KB on Hopper and the data centre's Blackwell, 163 KB on A100 and 99 KB on all others.
    row: Row = "hopper" if key.capability[0] in (9, 10) else "ampere" if key.capability == (8, 0) else "ada"
    columns = TABLE[row, key.kind]
    name = column_of(key)
    # The mask's promises are the last flag of a call; under them tiles are launched by role.
    roles = f"{name} roles"
    return columns[roles if key.flags[-1:] == (True,) and roles in columns else name]


def column_of(key: TuneKey) -> str:
    """The column of the table for the heads and dtype of a key."""
    width = max(key.width, key.value_width)
    name = "64" if width <= 64 else "128" if width <= 128 else "256"
    return f"exact {name}" if key.dtype == torch.float32 else name
