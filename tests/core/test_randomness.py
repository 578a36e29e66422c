"""Rows that depend on (seed, step, stream, index) alone."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.core.randomness import sample_noise, sample_uniform, shared_integer

INDICES = st.lists(st.integers(0, 2**40), min_size=1, max_size=6)
GOLDEN_NOISE = [[-0.1047009, 2.2259352, -0.109483], [1.7142601, 0.398523, -0.9628581]]
GOLDEN_OTHER = [-0.791487, -0.1198419, -1.2984015, -1.0041889]
GOLDEN_UNIFORM = [[0.5274117, 0.7736536, 0.9594571], [0.3460267, 0.3792003, 0.8752996]]
GOLDEN_INTEGERS = [3, 2, 3, 0, 3, 2, 2, 1]


@settings(max_examples=30, deadline=None)
@given(indices=INDICES, seed=st.integers(0, 2**63), step=st.integers(0, 10**7))
def test_rows_do_not_know_their_batch(indices: list[int], seed: int, step: int) -> None:
    for draw in (sample_noise, sample_uniform):
        together = draw(seed, indices, (2, 3), step=step)
        alone = torch.cat([draw(seed, [index], (2, 3), step=step) for index in indices])
        assert torch.equal(together, alone)
        assert together.shape == (len(indices), 2, 3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), step=st.integers(0, 1000), index=st.integers(0, 1000))
def test_every_part_of_the_key_matters(seed: int, step: int, index: int) -> None:
    rows = [
        sample_noise(seed, [index], (16,), step=step),
        sample_noise(seed + 1, [index], (16,), step=step),
        sample_noise(seed, [index + 1], (16,), step=step),
        sample_noise(seed, [index], (16,), step=step + 1),
        sample_noise(seed, [index], (16,), step=step, stream="renoise"),
    ]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert (a - b).abs().max().item() > 1e-3


def test_keys_do_not_run_into_each_other() -> None:
    a = sample_noise(1, [1], (8,), step=11)
    assert not torch.equal(a, sample_noise(11, [1], (8,), step=1))
    assert not torch.equal(a, sample_noise(1, [11], (8,), step=1))


def test_golden_numbers() -> None:
    """A change here means that no run can be resumed or compared with an older one."""
    noise = sample_noise(0, [0, 1], (3,), step=0)
    torch.testing.assert_close(noise, torch.tensor(GOLDEN_NOISE), rtol=0, atol=1e-6)
    other = sample_noise(7, [123], (4,), step=5, stream="score")
    torch.testing.assert_close(other, torch.tensor([GOLDEN_OTHER]), rtol=0, atol=1e-6)
    uniform = sample_uniform(0, [0, 1], (3,))
    torch.testing.assert_close(uniform, torch.tensor(GOLDEN_UNIFORM), rtol=0, atol=1e-6)
    assert [shared_integer(0, step, "exit", 4) for step in range(8)] == GOLDEN_INTEGERS


def test_moments_of_noise() -> None:
    rows = sample_noise(3, range(4000), (5,), step=2).double()
    count = rows.numel()
    assert abs(rows.mean().item()) < 5 / math.sqrt(count)
    assert abs(rows.std().item() - 1) < 5 / math.sqrt(2 * count)
    assert abs((rows**4).mean().item() - 3) < 5 * math.sqrt(96 / count)
    correlation = (rows[1:] * rows[:-1]).mean().item()
    assert abs(correlation) < 5 / math.sqrt(count)


def test_moments_of_uniform_numbers() -> None:
    rows = sample_uniform(3, range(8000), (), step=2).double()
    assert rows.shape == (8000,)
    assert rows.min().item() >= 0
    assert rows.max().item() < 1
    assert abs(rows.mean().item() - 0.5) < 5 / math.sqrt(12 * 8000)
    assert abs(rows.var().item() - 1 / 12) < 5 / math.sqrt(180 * 8000)


def test_shared_integer_is_uniform_and_independent_of_order() -> None:
    draws = torch.tensor([shared_integer(1, step, "exit", 4) for step in range(4000)])
    counts = torch.bincount(draws, minlength=4)
    assert counts.shape == (4,)
    assert (counts - 1000).abs().max().item() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    assert shared_integer(1, 0, "exit", 1) == 0
    with pytest.raises(ValueError, match="high must be at least 1"):
        shared_integer(1, 0, "exit", 0)


def test_dtypes_see_the_same_numbers() -> None:
    noise = sample_noise(0, [5], (64,))
    assert noise.dtype == torch.float32
    wide = sample_noise(0, [5], (64,), dtype=torch.float64, device="cpu")
    assert wide.dtype == torch.float64
    assert torch.equal(wide.float(), noise)
    assert torch.equal(sample_noise(0, [5], (64,), dtype=torch.bfloat16), noise.bfloat16())
    assert sample_noise(0, [5], (64,), device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="floating"):
        sample_noise(0, [5], (2,), dtype=torch.int64)
    with pytest.raises(ValueError, match="float32"):
        sample_uniform(0, [5], (2,), dtype=torch.bfloat16)


def test_indices_as_tensor_and_empty() -> None:
    indices = torch.tensor([4, 2])
    assert torch.equal(sample_noise(0, indices, (3,)), sample_noise(0, [4, 2], (3,)))
    assert sample_noise(0, [], (3,)).shape == (0, 3)
    for bad in (torch.tensor([0.5]), torch.tensor(1), torch.tensor([True])):
        with pytest.raises(ValueError, match="indices must be integers"):
            sample_noise(0, bad, (3,))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**7), index=st.integers(0, 2**40))
def test_a_row_is_that_of_philox_with_its_own_key(seed: int, step: int, index: int) -> None:
    # An odd number of draws before leaves half a word in the buffer, which must not reach the next row.
    digest = hashlib.blake2b(f"{seed} {step} {index} noise".encode(), digest_size=16).digest()
    fresh = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    expected = torch.from_numpy(fresh.standard_normal((3,), dtype=np.float32))
    assert torch.equal(sample_noise(seed, [index + 1, index], (3,), step=step)[1], expected)
