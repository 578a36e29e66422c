"""The benchmark of attention: its counts by brute force, its check before any time, its rows and record."""

import sys

import pytest
import torch
from studies import attention_speed as attention_benchmark
from studies.attention_speed import (
    MASKS,
    Case,
    build_inputs,
    build_mask,
    measure,
    pair_counts,
    peak_memory,
    record_of,
    table_of,
)

from fewstep.kernels.mask_conversion import dense


def small(tokens: int, mask: str) -> Case:
    return Case(tokens, mask, heads=2, width=8)


@pytest.mark.parametrize("name", MASKS)
def test_products_are_counted_as_by_hand(name: str) -> None:
    mask = build_mask(small(96, name))
    seen = dense(mask)[0]
    queries = torch.ones(96, dtype=torch.bool) if mask.query_active is None else mask.query_active
    keys = torch.ones(96, dtype=torch.bool) if mask.key_active is None else mask.key_active
    q, k = queries[:, None].expand(96, 96), keys[None].expand(96, 96)
    by_hand = (
        6 * (seen & q & k).sum() + 4 * (seen & q & ~k).sum() + 5 * (seen & ~q & k).sum() + 2 * (seen & ~q & ~k).sum()
    )
    assert pair_counts(mask) == (int(seen.sum()), int(by_hand))


def test_a_case_is_checked_and_timed_in_all_its_ways() -> None:
    case = small(64, "teacher_forcing_active")
    result = measure(case, rounds=2, dense_jvp=True, flex=False, memory=False)
    assert result.error < 1e-5
    assert result.error_dense is not None
    assert result.error_dense < 1e-5
    # 16 chunks of two tokens in each half: 16 * 17 pairs of chunks of 32 * 32.
    assert result.density == pytest.approx(16 * 17 / 32**2)
    assert [row.name for row in result.rows] == [
        "forward_jvp", "forward", "sdpa_forward", "backward", "sdpa_backward", "dense_jvp",
    ]  # fmt: skip
    assert all(0 < row.milliseconds <= row.median_milliseconds for row in result.rows)
    assert len(table_of([result]).splitlines()) == 2
    assert record_of([result])[0]["case"]["dtype"] == "torch.float32"  # pyright: ignore[reportIndexIssue]


def test_a_wrong_tangent_is_an_error_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_benchmark.TOLERANCE, torch.float32, 1e-12)
    with pytest.raises(ValueError, match="no times"):
        measure(small(64, "full"), rounds=1, dense_jvp=False, flex=False, memory=False)


def test_clean_tangents_are_zero_under_teacher_forcing() -> None:
    inputs = build_inputs(small(64, "teacher_forcing"))
    assert [float(x[:, :, :32].abs().sum()) for x in inputs[3:]] == [0.0, 0.0, 0.0]
    assert all(float(x[:, :, 32:].abs().sum()) > 1 for x in inputs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_call() -> None:
    """Dense scores of 1,024 tokens and two heads are 8 MB a copy; the outputs of ours are 0.13 MB."""
    case = small(1024, "block_causal")
    assert 16 < peak_memory(case, "dense_jvp") < 200
    assert peak_memory(case, "forward_jvp") < 16


@pytest.mark.parametrize(
    ("tokens", "mask", "message"), [(100, "full", "multiple of 32"), (64, "diagonal", "is unknown")]
)
def test_unknown_cases_are_named(tokens: int, mask: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_mask(Case(tokens, mask))
