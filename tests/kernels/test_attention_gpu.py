"""The Triton kernels on a GPU: numbers, choice of tiles, large addresses, and the public functions above them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention
from fewstep.kernels.attention_backward_triton import attention_backward
from fewstep.kernels.attention_jvp_triton import attention_forward, attention_forward_jvp, forward_kernel
from fewstep.kernels.attention_launch_triton import prepare_mask, tune_key
from fewstep.kernels.tuning.choice_triton import SWITCH, candidates, choose, forget
from fewstep.kernels.tuning.table import TileConfig
from tests.kernels.triton_cases import (
    BF16,
    CASES,
    F16,
    Case,
    all_cases_at,
    build,
    by_kernels,
    by_reference,
    check,
    common_mode,
    promised_rows,
    relative_error,
    repeated_difference,
    zero_tangent_difference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
WIDTHS = (16, 24, 40, 64, 96, 128, 160, 256)
MASKS_BY_LENGTH = ("full", "cross", "causal", "block_causal", "window_sink", "teacher_forcing", "documents")


def above(errors: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The quantities whose error is not within what is allowed."""
    return {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_short_sequences(case: Case) -> None:
    errors = check(case, "cuda")
    assert len(above(errors)) == 0, above(errors)


@pytest.mark.parametrize(
    "case", [case for case in all_cases_at(9) if case.mask in MASKS_BY_LENGTH], ids=lambda case: case.name
)
def test_longer_sequences(case: Case) -> None:
    errors = check(case, "cuda")
    assert len(above(errors)) == 0, above(errors)


@pytest.mark.parametrize("dtype", [torch.float32, F16, BF16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths_and_dtypes(width: int, dtype: torch.dtype) -> None:
    case = Case("teacher_forcing", dtype=dtype, heads=2, width=width, value_width=width, size=5)
    errors = check(case, "cuda")
    assert len(above(errors)) == 0, above(errors)


@pytest.mark.parametrize(("width", "value_width"), [(192, 128), (64, 256), (40, 200)])
def test_different_widths_of_keys_and_values(width: int, value_width: int) -> None:
    errors = check(Case("window_sink", dtype=BF16, width=width, value_width=value_width, size=5), "cuda")
    assert len(above(errors)) == 0, above(errors)


@pytest.mark.parametrize("kind", ["forward", "jvp"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_candidate_gives_the_same_numbers(kind: str, width: int) -> None:
    call = build(Case("teacher_forcing", dtype=BF16, width=width, value_width=width, size=5), "cuda")
    expected = by_reference(call)
    has = (True,) * 3 if kind == "jvp" else (False,) * 3
    key = tune_key("jvp" if kind == "jvp" else "forward", call.primals[0], call.primals[2], call.mask, has)
    configs = candidates(key)
    assert len(configs) >= 2
    tangents = call.tangents if kind == "jvp" else (None, None, None)
    for config in configs:
        output, _, tangent, _ = attention_forward_jvp(*call.primals, *tangents, mask=call.mask, config=config)
        assert relative_error(output, expected["output"]) < 5e-3
        if kind == "jvp":
            assert relative_error(tangent, expected["tangent"]) < 5e-3


def test_every_candidate_of_the_backward_pass_gives_the_same_numbers() -> None:
    call = build(Case("teacher_forcing", dtype=BF16, width=128, value_width=128, size=5), "cuda")
    expected = by_reference(call)
    output, lse = attention_forward(*call.primals, mask=call.mask)
    q, _, v = call.primals
    configs: set[TileConfig] = set()
    for kind in ("dq", "dkdv"):
        configs |= set(candidates(tune_key(kind, q, v, call.mask, ())))
    # The smallest tiles fit both kernels on every GPU.
    for config in sorted(configs, key=lambda c: c.query_tile * c.key_tile)[:3]:
        gradients = attention_backward(*call.primals, output, lse, *call.cotangents, mask=call.mask, config=config)
        for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
            assert relative_error(gradient, expected[name]) < 5e-3


def test_large_common_tangent_of_keys_costs_no_accuracy() -> None:
    assert common_mode("cuda", 128) < 5e-3
    assert common_mode("cuda", 1000) < 5e-3


def test_numbers_that_are_exactly_zero() -> None:
    assert repeated_difference("cuda") == 0
    assert zero_tangent_difference("cuda") == 0
    assert promised_rows("cuda") == 0


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_many_repetitions_are_bitwise_equal(dtype: torch.dtype) -> None:
    call = build(Case("teacher_forcing", dtype=dtype, heads=4, key_heads=2, width=64, size=20), "cuda")
    first = by_kernels(call, None)
    assert len(first) == 9
    for _ in range(10):
        for name, value in by_kernels(call, None).items():
            assert torch.equal(value, first[name]), name


def test_measured_tiles_give_the_numbers_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    call = build(Case("teacher_forcing", dtype=BF16, heads=4, width=64, value_width=64, size=20), "cuda")
    expected = by_reference(call)
    for switch in ("1", "0"):
        monkeypatch.setenv(SWITCH, switch)
        forget()
        output, lse, tangent, _ = attention_forward_jvp(*call.primals, *call.tangents, mask=call.mask)
        gradients = attention_backward(*call.primals, output, lse, *call.cotangents, mask=call.mask)
        assert relative_error(output, expected["output"]) < 5e-3
        assert relative_error(tangent, expected["tangent"]) < 5e-3
        for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
            assert relative_error(gradient, expected[name]) < 5e-3
    forget()


def test_tiles_are_measured_once_for_lengths_of_a_class_and_for_all_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setenv(SWITCH, "1")
    forget()
    launches: list[TileConfig] = []
    counts: list[int] = []
    # 77 times as many tokens: 462 and 231 are of one class, and the third is what another process finds.
    for size in (6, 3, 6):
        if len(counts) == 2:
            forget()
        call = build(Case("causal", dtype=BF16, width=64, value_width=64, size=size), "cuda")
        q, _, v = call.primals
        key = tune_key("jvp", q, v, prepare_mask(call.mask, q, q), (True,) * 3)
        choose(key, launches.append)
        counts.append(len(launches))
        assert len(set(launches)) == len(candidates(key))
    assert counts[0] == counts[1] == counts[2]
    forget()


def test_lengths_do_not_compile_again() -> None:
    compiled: list[int] = []
    for length in (100, 117, 1000, 1023):
        q = torch.randn(1, 2, length, 64, dtype=BF16, device="cuda")
        attention_forward(q, q, q, mask=masks.causal(length, device="cuda"), config=TileConfig(64, 64, 4, 2))
        compiled.append(len(forward_kernel.device_caches[q.device.index][0]))
    assert compiled[1:] == compiled[:1] * 3


def test_addresses_beyond_32_bits() -> None:
    tokens, heads, width = 131072, 130, 128
    assert tokens * heads * width > 2**31
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free GPU memory")
    mask = masks.documents([256] * (tokens // 256), device="cuda")
    # Tokens first: offsets of rows overflow; those of heads do in the contiguous results.
    q, k, v = (torch.randn(1, tokens, heads, width, dtype=BF16, device="cuda").transpose(1, 2) for _ in range(3))
    config = TileConfig(64, 32, 4, 2)
    output, lse, tangent, mean = attention_forward_jvp(q, k, v, k, q, v, mask=mask, config=config)
    gradients = attention_backward(q, k, v, output, lse, v, None, mask=mask, config=config)
    last_q, last_k, last_v = (x[:, -1:].contiguous() for x in (q, k, v))
    alone = attention_forward_jvp(last_q, last_k, last_v, last_k, last_q, last_v, mask=mask, config=config)
    for whole, part in zip((output, lse, tangent, mean), alone, strict=True):
        assert torch.equal(whole[:, -1:], part)
    alone_gradients = attention_backward(
        last_q, last_k, last_v, alone[0], alone[1], last_v, None, mask=mask, config=config
    )
    for whole, part in zip(gradients, alone_gradients, strict=True):
        assert torch.equal(whole[:, -1:], part)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_forward_mode_through_the_public_function(dtype: torch.dtype, compiled: bool) -> None:
    call = build(Case("teacher_forcing", dtype=dtype, heads=4, key_heads=2, width=64, value_width=64, size=5), "cuda")
    expected = by_reference(call)
    assert all(tangent is not None for tangent in call.tangents)

    def pair(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        result = torch.func.jvp(lambda q, k, v: attention(q, k, v, mask=call.mask), primals, tangents)
        return result[0], result[1]

    run = torch.compile(pair, fullgraph=True) if compiled else pair
    tangents = tuple(tangent for tangent in call.tangents if tangent is not None)
    output, tangent = run(call.primals, tangents)
    limit = 5e-6 if dtype == torch.float32 else 5e-3
    assert relative_error(output, expected["output"]) < limit
    assert relative_error(tangent, expected["tangent"]) < limit


def test_gradients_through_the_public_function() -> None:
    call = build(Case("block_causal", dtype=BF16, heads=4, key_heads=2, width=64, value_width=64, size=5), "cuda")
    expected = by_reference(replace(call, cotangents=(call.cotangents[0], torch.zeros_like(call.cotangents[1]))))
    primals = [x.detach().requires_grad_() for x in call.primals]
    output = attention(*primals, mask=call.mask)
    output.backward(call.cotangents[0])
    for name, primal in zip(("dq", "dk", "dv"), primals, strict=True):
        assert primal.grad is not None
        assert relative_error(primal.grad, expected[name]) < 5e-3
