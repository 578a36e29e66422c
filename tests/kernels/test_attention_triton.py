"""The Triton kernels without a GPU: numbers in Triton's interpreter, compilation, and the choice of tiles."""

# ruff: noqa: E402 - without Triton the imports below fail, and the file is to be skipped before.

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from fewstep.kernels import mask as masks
from fewstep.kernels.attention_backward_triton import attention_backward
from fewstep.kernels.attention_jvp_triton import attention_forward, attention_forward_jvp
from fewstep.kernels.attention_launch_triton import ACTIVE, CONSTANT, PLAIN
from fewstep.kernels.tuning.choice_triton import (
    INTERPRETER_CONFIG,
    SWITCH,
    TuneKey,
    candidates,
    choose,
    first_that_fits,
    forget,
    measures,
    size_class,
)
from fewstep.kernels.tuning.registers_triton import Usage, usage_of
from fewstep.kernels.tuning.table import TABLE, Kind, TileConfig
from tests.kernels.triton_cases import CASES, MASKS, Case, build, relative_error

# Bytes on chip that a program may use, by compute capability.
MEMORY = {90: 232448, 80: 166912, 89: 101376}


@pytest.fixture(scope="module")
def interpreted(repository: Path) -> dict[str, Any]:
    """What `tests.kernels.triton_cases` prints: one process for all cases, most of its time goes into imports."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_cases"],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_kernels_in_the_interpreter_are_as_exact_as_plain_torch(interpreted: dict[str, Any], name: str) -> None:
    errors = interpreted["cases"][name]
    assert len(errors) == (9 if "-tqkv-" in name else 4)
    above = {quantity: pair for quantity, pair in errors.items() if not pair[0] <= pair[1]}
    assert len(above) == 0, above


@pytest.mark.slow
def test_large_common_tangent_of_keys_costs_no_accuracy(interpreted: dict[str, Any]) -> None:
    assert interpreted["numbers"]["common_mode"] < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repeated_difference", "zero_tangent_difference", "promised_rows"])
def test_numbers_that_are_exactly_zero(interpreted: dict[str, Any], name: str) -> None:
    assert interpreted["numbers"][name] == 0


@pytest.mark.parametrize("name", ["mixed_1", "mixed_2", "mixed_3"])
def test_mixed_masks_hold_every_class_of_tiles(name: str) -> None:
    schedule = MASKS[name](1).schedule(INTERPRETER_CONFIG.query_tile, INTERPRETER_CONFIG.key_tile)
    lists = schedule.row_ptr.diff().view(-1, 4)
    rows = {True: schedule.query_active, False: ~schedule.query_active & schedule.row_active[0]}
    # Keys of classes 1 and 3 beside inactive queries of an active row are the update of rank one.
    for chosen in rows.values():
        assert int(lists[chosen].sum(0).min()) > 0


def test_error_measure_sees_missing_and_misplaced_numbers() -> None:
    x = torch.tensor([1.0, 2.0, -torch.inf])
    assert relative_error(x, x) == 0
    assert relative_error(torch.tensor([1.0, torch.nan, -torch.inf]), x) == torch.inf
    assert relative_error(torch.tensor([1.0, 2.0, 0.0]), x) == torch.inf
    assert relative_error(torch.tensor([1.0, 2.0]), torch.zeros(2)) == torch.inf
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)


def test_layouts_are_what_they_are_called() -> None:
    strides = {}
    for case in CASES:
        if case.mask == "block_causal" and case.batch == 2:
            strides[case.layout] = build(case, "cpu").primals[0].stride()
    # [B, H, N, D] = [2, 2, 73, 16]
    assert strides["tokens_first"] == (73 * 32, 16, 32, 1)
    assert strides["width_first"] == (2 * 16 * 73, 16 * 73, 1, 73)
    assert strides["expanded"] == (0, 73 * 48, 48, 1)


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert Case("full").name != Case("full", tangents="q").name


def inputs(width: int = 16, value_width: int = 16, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, v of 8 queries and keys."""
    return tuple(torch.randn(1, 2, 8, w).to(dtype) for w in (width, width, value_width))


def test_what_has_no_kernel_is_refused_with_the_backend_that_has_one() -> None:
    with pytest.raises(ValueError, match=r"on CUDA and q is on cpu; use backend='tiled'"):
        attention_forward(*inputs())
    with pytest.raises(ValueError, match=r"q is torch\.float64; use backend='tiled'"):
        attention_forward(*inputs(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"16 \(q, k\) and 257 \(v\) wide and the Triton kernels take at most 256"):
        attention_forward(*inputs(16, 257))
    with pytest.raises(ValueError, match="The mask is for 9 queries"):
        attention_forward(*inputs(), mask=masks.full(9))
    q, k, v = inputs()
    with pytest.raises(ValueError, match="tangent of k has shape"):
        attention_forward_jvp(q, k, v, None, k[:, :, :4], None)
    with pytest.raises(ValueError, match=r"on CUDA and q is on cpu"):
        attention_backward(q, k, v, v, torch.zeros(1, 2, 8), v, None)


def key(
    capability: tuple[int, int], kind: Kind = "jvp", dtype: torch.dtype = torch.bfloat16, width: int = 128
) -> TuneKey:
    return TuneKey(kind, capability, width, width, dtype, (True, False))


def test_table_holds_powers_of_two_and_distinct_candidates() -> None:
    assert len(TABLE) == 12
    for columns in TABLE.values():
        assert {name for name in columns if not name.endswith("roles")} == {
            *("64", "128", "256"),
            *("exact 64", "exact 128", "exact 256"),
        }
        for tiles in columns.values():
            assert len(set(tiles)) == len(tiles) >= 2
            for found in tiles:
                assert {found.query_tile, found.key_tile} <= {16, 32, 64, 128}
                assert found.warps in (4, 8)
                assert found.stages in (1, 2, 3)


def test_candidates_depend_on_gpu_width_dtype_and_promises() -> None:
    hopper, ampere = key((9, 0)), key((8, 0))
    assert candidates(hopper)[0] == TileConfig(128, 32, 8, 2)
    assert candidates(ampere)[0] == TileConfig(128, 16, 8, 3, early=True)
    assert candidates(replace(ampere, flags=(True, True)))[0] == TileConfig(128, 16, 8, 2, early=True)
    assert candidates(key((12, 0))) == candidates(key((8, 6)))
    assert candidates(key((10, 0))) == candidates(hopper)
    assert candidates(key((9, 0), width=40)) == candidates(key((9, 0), width=64))
    assert candidates(key((9, 0), dtype=torch.float32))[0] == TileConfig(16, 16, 8, 1)
    with pytest.raises(ValueError, match=r"8\.0 or newer and this one has 7\.5; use backend='tiled'"):
        candidates(key((7, 5)))


def test_classes_of_lengths() -> None:
    assert [size_class(tokens) for tokens in (1, 512, 513, 4096, 4097, 10**6)] == [0, 0, 1, 1, 2, 2]


def out_of_memory() -> Exception:
    return triton.OutOfResources(300000, 232448, "shared memory")


def test_candidates_beyond_the_chip_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    forget()
    tried: list[TileConfig] = []

    def launch(config: TileConfig) -> None:
        tried.append(config)
        if len(tried) == 1:
            raise out_of_memory()

    chosen = choose(key((9, 0)), launch)
    assert chosen == candidates(key((9, 0)))[1]
    assert choose(key((9, 0)), launch) == chosen
    assert len(tried) == 2
    forget()


def test_no_fitting_candidate_is_an_error() -> None:
    def launch(config: TileConfig) -> None:
        raise out_of_memory()

    with pytest.raises(ValueError, match=r"No tile of the jvp attention kernel fits heads of 128 and 128"):
        first_that_fits(key((8, 9)), launch)


def test_other_errors_of_a_launch_rise() -> None:
    def launch(config: TileConfig) -> None:
        raise RuntimeError("illegal address")

    with pytest.raises(RuntimeError, match="illegal address"):
        first_that_fits(key((8, 9), kind="dq"), launch)


def test_switch_of_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    assert measures() is True
    monkeypatch.setenv(SWITCH, "0")
    assert measures() is False
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ValueError, match=r"FEWSTEP_ATTENTION_AUTOTUNE='yes'; set it to 1"):
        measures()


# Heads for which first candidates are compiled here; the record in assets/benchmarks has all.
WIDTHS = (64, 128)
# Bytes of stack of a thread, where there are some: in the walk over partial tiles alone.
STACKS = {(89, "jvp", 128, "plain"): 16, (89, "jvp", 128, "active"): 8}
ROLES = {"plain": PLAIN, "active": ACTIVE, "constant": CONSTANT}


def first_usage(kind: Kind, capability: int, width: int, role: str) -> tuple[TileConfig, Usage]:
    """The first candidate of a key under a mask with partial tiles, and what it takes."""
    found = candidates(replace(key(divmod(capability, 10), kind, width=width), flags=(True, role != "plain")))[0]
    return found, usage_of(kind, capability, found, width=width, role=ROLES[role])


@pytest.mark.slow
@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize("kind", ["forward", "jvp", "dq", "dkdv"])
def test_first_candidates_keep_all_numbers_in_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind, capability: int
) -> None:
    """Compiled for a GPU that need not be there: no stack, memory that the chip has, products on matrix units."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for width in WIDTHS:
        for role in ("plain", "active", "constant") if kind == "jvp" else ("plain",):
            if role == "constant" and width == 64:
                continue
            config, usage = first_usage(kind, capability, width, role)
            case = width, role, config
            assert usage.stack <= STACKS.get((capability, kind, width, role), 0), case
            assert 0 < usage.shared <= MEMORY[capability], case
            assert usage.registers <= 255, case
            assert usage.products > 0, case
            # Loads of the next tile overlap with the products where there are stages.
            assert usage.copies == (config.stages > 1), case


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "capability", "width"), [("jvp", 80, 128), ("jvp", 90, 64), ("dkdv", 90, 128)])
def test_a_key_bias_costs_no_stack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind, capability: int, width: int
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config, _ = first_usage(kind, capability, width, "plain")
    assert usage_of(kind, capability, config, width=width, biased=True).stack == 0


@pytest.mark.slow
def test_more_than_the_registers_hold_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiles that stood first for A100, whose rows are fewer than the heads are wide; Hopper's wait on products."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert usage_of("jvp", 80, TileConfig(64, 32, 4, 2), width=128).stack > 4000
    hopper = usage_of("jvp", 90, TileConfig(128, 32, 8, 2), width=128)
    assert hopper.products == 60
    assert hopper.full_waits == 10
