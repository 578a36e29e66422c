"""Ranks, risky samples, the controller of their share, and the selective penalty."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.reward.astrolabe import (
    RiskShare,
    rank_gap,
    reference_is_stale,
    risky_samples,
    selective_penalty,
)


def test_gap_golden() -> None:
    # Primary ranks 2, 0, 1; auxiliary ranks (0, 1, 2) and (1, 0, 2).
    gap = rank_gap(torch.tensor([[9.0, 1.0, 5.0]]), torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 1.0, 3.0]]]))
    assert gap.tolist() == [[1.5, -0.5, -1.0]]
    # Ties share their rank.
    assert rank_gap(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[[0.0, 5.0, 9.0]]])).tolist() == [[1.0, 0.0, -1.0]]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 6))
def test_gaps_sum_to_zero_and_follow_a_permutation(seed: int, prompts: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    primary = torch.randint(0, 4, (prompts, samples), generator=generator).double()
    auxiliary = torch.randn(2, prompts, samples, generator=generator, dtype=torch.float64)
    gap = rank_gap(primary, auxiliary)
    assert gap.sum(dim=1).abs().max().item() < 1e-12
    order = torch.randperm(samples, generator=generator)
    assert torch.equal(rank_gap(primary[:, order], auxiliary[..., order]), gap[:, order])
    # Only the order of a reward counts.
    assert torch.equal(rank_gap(3 * primary + 1, auxiliary.exp()), gap)


def test_risky_is_what_the_primary_likes_more_than_the_others_do() -> None:
    # The first prompt has one sample that only the primary reward likes, in the second all rewards agree.
    primary = torch.tensor([[10.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 3.0]])
    auxiliary = torch.tensor([[[0.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0]]])
    expected = [[True, False, False, False], [False] * 4]
    assert risky_samples(rank_gap(primary, auxiliary), share=0.5).tolist() == expected


def test_share_of_the_non_negative_gaps() -> None:
    gap = torch.cat([torch.arange(100.0), -torch.arange(1.0, 101.0)])
    assert int(risky_samples(gap, share=0.1).sum()) == 10
    assert int(risky_samples(gap, share=0.0).sum()) == 0
    assert int(risky_samples(torch.zeros(4), share=1.0).sum()) == 0
    with pytest.raises(ValueError, match="share"):
        risky_samples(gap, share=1.5)


def test_controller_steps_and_stops() -> None:
    share = RiskShare().updated(1.0)
    assert (share.share, share.recent) == (0.1, (1.0,))
    assert share.updated(2.0).share == pytest.approx(0.11)
    assert share.updated(0.5).share == pytest.approx(0.09)
    assert share.updated(2.0).updated(1.5).share == pytest.approx(0.11)
    up, down = share, share
    for i in range(30):
        up, down = up.updated(2.0 + i), down.updated(-float(i))
    assert (up.share, down.share) == (0.2, 0.02)
    assert len(up.recent) == 20
    with pytest.raises(ValueError, match="lowest <= share"):
        RiskShare(share=0.5)


def test_penalty_counts_risky_samples_only() -> None:
    prediction = torch.tensor([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]], requires_grad=True)
    reference = torch.zeros(3, 2, requires_grad=True)
    penalty = selective_penalty(prediction, reference, torch.tensor([True, True, False]))
    penalty.backward()
    assert penalty.item() == pytest.approx((1.0 + 5.0) / 2)
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[0.5, 0.5], [1.5, 0.5], [0.0, 0.0]]
    assert reference.grad is None
    none = selective_penalty(prediction, reference, torch.zeros(3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(none, prediction)
    assert (none.item(), float(gradient.abs().max())) == (0.0, 0.0)


def test_reference_rule() -> None:
    assert [reference_is_stale(0.1, 15), reference_is_stale(0.1, 16), reference_is_stale(0.2, 0)] == [False, True, True]
    with pytest.raises(ValueError, match="positive"):
        reference_is_stale(0.1, 0, max_epochs=0)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"primary \[P, K\]"):
        rank_gap(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="auxiliary rewards of samples"):
        rank_gap(torch.zeros(1, 2), torch.tensor([[[0.0, math.nan]]]))
    with pytest.raises(ValueError, match="must be bool"):
        selective_penalty(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
