"""Routing by noise level, injection of student weights, and preferences on transitions."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.training.roles import inject_student
from fewstep.dmd.reward.flow_sde import Transition, transition_log_prob
from fewstep.dmd.reward.groups import route_steps
from fewstep.dmd.reward.methods.flash import best_and_worst, preference_loss, preference_margin
from tests.dmd.gaussian_bench import hermite_grid


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_routes() -> None:
    assert route_steps((1.0, 0.9, 0.75, 0.5), boundary=0.75) == ((0, 1, 2), (3,))
    with pytest.raises(ValueError, match="one side"):
        route_steps((1.0, 0.9), boundary=0.5)


def test_injection() -> None:
    fake, student = [tensor(1.0, 2.0), tensor(4.0)], [tensor(3.0, 0.0), tensor(0.0)]
    inject_student(fake, student, decay=1.0)
    assert [w.tolist() for w in fake] == [[1.0, 2.0], [4.0]]
    inject_student(fake, student, decay=0.75)
    assert [w.tolist() for w in fake] == [[1.5, 1.5], [3.0]]
    inject_student(fake, student, decay=0.0)
    assert [w.tolist() for w in fake] == [[3.0, 0.0], [0.0]]
    with pytest.raises(ValueError, match="do not have the same weights"):
        inject_student(fake, student[:1], decay=0.5)
    with pytest.raises(ValueError, match="decay"):
        inject_student(fake, student, decay=1.5)


def test_pairs_ignore_a_constant_and_refuse_ties() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.4], [3.0, 1.0, 2.0]])
    assert [index.tolist() for index in best_and_worst(scores)] == [[1, 0], [0, 1]]
    assert [index.tolist() for index in best_and_worst(scores + 5)] == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"states \[1\] score the same"):
        best_and_worst(torch.tensor([[0.0, 1.0], [2.0, 2.0]]))
    with pytest.raises(ValueError, match="scores of samples"):
        best_and_worst(torch.tensor([[0.0, math.nan]]))


def make_pair() -> tuple[Tensor, Tensor, Transition, Tensor]:
    generator = torch.Generator().manual_seed(0)
    win, lose, mean, reference = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    return win, lose, Transition(mean.requires_grad_(), tensor(0.3, 0.5, 1.0).view(3, 1)), reference


def test_margin_is_the_difference_of_log_ratios() -> None:
    win, lose, policy, reference = make_pair()
    anchor = Transition(reference, policy.std)
    parts = [
        transition_log_prob(x, policy, reduction="sum") - transition_log_prob(x, anchor, reduction="sum")
        for x in (win, lose)
    ]
    margin = preference_margin(win, lose, policy, reference)
    torch.testing.assert_close(margin, parts[0] - parts[1])
    torch.testing.assert_close(preference_margin(lose, win, policy, reference), -margin)
    one = Transition(tensor(0.6)[None], tensor(0.5))
    golden = preference_margin(tensor(2.0)[None], tensor(-1.0)[None], one, tensor(0.4)[None])
    assert float(golden) == pytest.approx(0.2 * 3.0 / 0.25)


def test_at_the_reference_the_loss_is_log_two() -> None:
    win, lose, policy, _ = make_pair()
    margin = preference_margin(win, lose, policy, policy.mean)
    leaf = margin.detach().requires_grad_()
    loss = preference_loss(leaf, dpo_beta=0.7)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert leaf.grad is not None
    assert leaf.grad.tolist() == pytest.approx([-0.7 / 2 / 3] * 3)


def test_gradient_reaches_the_mean_alone() -> None:
    win, lose, policy, reference = make_pair()
    for x in (win, lose, reference):
        x.requires_grad_()
    preference_loss(preference_margin(win, lose, policy, reference), dpo_beta=0.5).backward()
    assert [x.grad for x in (win, lose, reference)] == [None, None, None]
    assert policy.mean.grad is not None
    assert float(policy.mean.grad.abs().min()) > 0


def preference_gradient(shift: float, *, certain: bool) -> float:
    """d loss / d mean at a mean `shift` above the reference N(0, 0.6^2), reward 0.9 x, dpo_beta 0.5."""
    points, weights = hermite_grid(24, 2)
    first, second = 0.6 * points[:, :1], 0.6 * points[:, 1:]
    mean = torch.full_like(first, shift).requires_grad_()
    margin = preference_margin(first, second, Transition(mean, tensor(0.6)), torch.zeros_like(first))
    gap = 0.9 * (first - second)[:, 0]
    wins = (gap > 0).double() + 0.5 * (gap == 0) if certain else torch.sigmoid(gap)
    mass = weights * len(points)
    loss = preference_loss(margin, dpo_beta=0.5, weight=mass * wins)
    (loss + preference_loss(-margin, dpo_beta=0.5, weight=mass * (1 - wins))).backward()
    assert mean.grad is not None
    return float(mean.grad.sum())


def test_bradley_terry_pairs_rest_at_the_tilt() -> None:
    tilt = 0.36 * 0.9 / 0.5
    assert preference_gradient(tilt, certain=False) == pytest.approx(0.0, abs=1e-12)
    assert preference_gradient(0.97 * tilt, certain=False) < -1e-3
    assert preference_gradient(1.03 * tilt, certain=False) > 1e-3


def test_certain_winners_never_rest() -> None:
    for shift in (0.0, 1.0, 5.0):
        assert preference_gradient(shift, certain=True) < 0


def test_wrong_input() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="deterministic step"):
        preference_margin(x, x, Transition(x, torch.zeros(1, 1)), x)
    with pytest.raises(ValueError, match="dpo_beta"):
        preference_loss(torch.zeros(1), dpo_beta=0.0)
    with pytest.raises(ValueError, match="margins of samples"):
        preference_loss(torch.tensor([math.nan]), dpo_beta=1.0)
