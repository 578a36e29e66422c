"""Losses of a latent reward model against what minimises them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.dmd.reward.latent.loss import (
    bradley_terry_loss,
    correlation,
    group_pairs,
    latent_regression_loss,
    pair_accuracy,
)
from tests.dmd.gaussian_bench import hermite_grid


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_regression_finds_the_posterior_mean() -> None:
    """x0 is N(0, 1), the reward 2 x0: E[2 x0 | x_t] = 2 (1 - t) x_t / ((1 - t)^2 + t^2), the best of all k x_t."""
    t = 0.4
    points, weights = hermite_grid(8, 2)
    x0, eps = points[:, 0], points[:, 1]
    x_t, reward = (1 - t) * x0 + t * eps, 2 * x0
    scale = (weights * len(weights)).sqrt()
    k = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = latent_regression_loss(scale * k * x_t, scale * reward)
    (slope,) = torch.autograd.grad(loss, k, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, k)
    # A quadratic: one step of Newton from 0.
    found = float((-slope / curvature).detach())
    assert found == pytest.approx(2 * (1 - t) / ((1 - t) ** 2 + t**2), rel=1e-12)
    best = latent_regression_loss(scale * found * x_t, scale * reward)
    assert best.item() == pytest.approx(4 * t**2 / ((1 - t) ** 2 + t**2), rel=1e-10)


def test_bradley_terry_is_least_at_the_rewards() -> None:
    """Without noise s = r / temperature is the minimiser, and only up to a constant in each group."""
    rewards, groups = tensor(0.3, -1.2, 0.7, 2.0, 0.1), torch.tensor([0, 0, 0, 1, 1])
    scores = (rewards / 0.5 + tensor(4.0, 4.0, 4.0, -3.0, -3.0)).requires_grad_()
    loss = bradley_terry_loss(scores, rewards, groups, temperature=0.5)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(gradient.abs().max()) < 1e-15
    wins = [torch.sigmoid(2 * (rewards[i] - rewards[j])) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4))]
    entropy = [-(p * p.log() + (1 - p) * (1 - p).log()) for p in wins]
    assert loss.item() == pytest.approx(float(torch.stack(entropy).mean()), rel=1e-12)
    worse = bradley_terry_loss(1.1 * scores.detach(), rewards, groups, temperature=0.5)
    assert worse.item() > loss.item()
    flat = bradley_terry_loss(torch.zeros(5), rewards.float(), groups, temperature=0.5)
    assert flat.item() == pytest.approx(math.log(2))


def test_pairs_stay_in_their_group() -> None:
    first, second = group_pairs(torch.tensor([3, 5, 3, 3, 5]))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 4), (2, 3)]
    with pytest.raises(ValueError, match="no group has two members"):
        group_pairs(torch.tensor([0, 1, 2]))


@given(
    st.lists(st.integers(-20, 20), min_size=2, max_size=8, unique=True),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_agreement_knows_neither_scale_nor_place(values: list[int], scale: float, shift: float) -> None:
    rewards, groups = tensor(*values), torch.zeros(len(values), dtype=torch.int64)
    assert correlation(scale * rewards + shift, rewards) == pytest.approx(1.0)
    assert correlation(-scale * rewards + shift, rewards) == pytest.approx(-1.0)
    assert pair_accuracy(scale * rewards + shift, rewards, groups) == 1.0
    assert pair_accuracy(-scale * rewards, rewards, groups) == 0.0
    assert pair_accuracy(0 * rewards, rewards, groups) == 0.5


def test_agreement_by_hand() -> None:
    scores, rewards = tensor(1.0, 2.0, 3.0, 9.0), tensor(1.0, 3.0, 2.0, 2.0)
    groups = torch.tensor([0, 0, 0, 1])
    # Pairs (0, 1) and (0, 2) agree, (1, 2) does not; sample 3 has no partner.
    assert pair_accuracy(scores, rewards, groups) == pytest.approx(2 / 3)
    assert correlation(scores[:3], rewards[:3]) == pytest.approx(0.5)
    assert correlation(tensor(1.0, 1.0), tensor(0.0, 3.0)) == 0.0
    with pytest.raises(ValueError, match="all rewards of a group are equal"):
        pair_accuracy(scores, tensor(1.0, 1.0, 1.0, 2.0), groups)


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        bradley_terry_loss(tensor(0.0, 1.0), tensor(0.0, 1.0), torch.zeros(2), temperature=0)
    with pytest.raises(ValueError, match=r"rewards of samples \[1\] are not finite"):
        latent_regression_loss(tensor(0.0, 1.0), tensor(0.0, math.nan))
    with pytest.raises(ValueError, match="shape"):
        latent_regression_loss(tensor(0.0, 1.0), tensor(0.0))
