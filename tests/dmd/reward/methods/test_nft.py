"""DiffusionNFT and AdvantageFlow: identities of the losses, and minimisers against Gaussians."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.dmd.reward.inputs import reference_penalty
from fewstep.dmd.reward.methods.nft import (
    adaptive_nft_loss,
    nft_loss,
    optimality_probability,
    ramped_decay,
)
from tests.dmd.gaussian_bench import Gaussian, hermite_grid

OLD = Gaussian(0.4, 1.2)


def nft_target(old_prediction: Tensor, target: Tensor, probability: Tensor, *, nft_beta: float) -> Tensor:
    """old + (2 r - 1) (target - old) / beta: what `nft_loss` regresses on, [B, ...], without graph.

    Raises:
        ValueError: the shapes differ, a probability is outside [0, 1], or nft_beta is not positive.
    """
    old = old_prediction.detach()
    sign = (2 * probability - 1).view(-1, *([1] * (old.ndim - 1)))
    return old + sign * (target.detach() - old) / nft_beta


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(count: int = 4, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_probability_golden() -> None:
    values = optimality_probability(tensor(-9.0, -2.5, 0.0, 1.0, 5.0))
    assert values.tolist() == pytest.approx([0.0, 0.25, 0.5, 0.6, 1.0])
    with pytest.raises(ValueError, match=r"samples \[0\] are not finite"):
        optimality_probability(tensor(math.nan))
    with pytest.raises(ValueError, match="max_advantage"):
        optimality_probability(tensor(1.0), max_advantage=0.0)


def test_loss_golden() -> None:
    # old 1, prediction 2, target 0, beta 0.5: branches 1.5 and 0.5.
    loss = nft_loss(tensor(2.0)[None], tensor(1.0)[None], tensor(0.0)[None], tensor(0.7), nft_beta=0.5)
    assert loss.item() == pytest.approx(0.7 * 2.25 + 0.3 * 0.25)
    # beta 1: the positive branch is the prediction, the negative 2 old - prediction.
    loss = nft_loss(tensor(2.0)[None], tensor(1.0)[None], tensor(0.0)[None], tensor(0.7), nft_beta=1.0)
    assert loss.item() == pytest.approx(0.7 * 4.0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_gradient_is_that_of_regression_on_the_signed_target(beta: float) -> None:
    prediction, old, target = batch()
    prediction.requires_grad_()
    probability = tensor(0.0, 0.3, 0.5, 1.0)
    (gradient,) = torch.autograd.grad(nft_loss(prediction, old, target, probability, nft_beta=beta), prediction)
    aim = nft_target(old, target, probability, nft_beta=beta)
    expected = 2 * beta**2 * (prediction - aim) / prediction.numel()
    torch.testing.assert_close(gradient, expected.detach())


def test_gradient_reaches_the_policy_alone() -> None:
    prediction, old, target = (x.requires_grad_() for x in batch())
    probability = tensor(0.1, 0.3, 0.5, 0.9).requires_grad_()
    loss = nft_loss(prediction, old, target, probability, nft_beta=0.5)
    loss = loss + adaptive_nft_loss(prediction, old, target, probability, nft_beta=0.5)
    loss = loss + reference_penalty(prediction, old).mean()
    loss.backward()
    assert prediction.grad is not None
    assert float(prediction.grad.abs().min()) > 0
    assert [x.grad is None for x in (old, target, probability)] == [True, True, True]


def test_even_odds_leave_the_old_policy() -> None:
    old, target, _ = batch()
    prediction = old.clone().requires_grad_()
    for loss in (nft_loss, adaptive_nft_loss):
        (gradient,) = torch.autograd.grad(
            loss(prediction, old, target, torch.full((4,), 0.5), nft_beta=0.5), prediction
        )
        assert float(gradient.abs().max()) < 1e-15


@pytest.mark.parametrize(("beta", "bound"), [(0.1, 5.0), (1.0, 5.0), (1.0, 2.5)])
def test_adaptive_gradient_at_the_old_policy_knows_neither_beta_nor_bound(beta: float, bound: float) -> None:
    x0, eps, _ = batch()
    t, advantages = tensor(0.2, 0.4, 0.6, 0.8), tensor(1.0, -0.5, 2.0, 0.1)
    x_t = add_noise(x0, eps, t)
    old_velocity = OLD.velocity(x_t, t[:, None])
    velocity = old_velocity.clone().requires_grad_()
    x0_old, x0_new = x_t - t[:, None] * old_velocity, x_t - t[:, None] * velocity
    probability = optimality_probability(advantages, max_advantage=bound)
    loss = adaptive_nft_loss(x0_new, x0_old, x0, probability, nft_beta=beta, max_advantage=bound)
    (gradient,) = torch.autograd.grad(loss, velocity)
    omega = (x0_old - x0).abs().mean(dim=1, keepdim=True)
    expected = 2 * advantages[:, None] * t[:, None] ** 2 * (eps - x0 - old_velocity).neg() / (omega * 6) / 4
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_minimiser_for_a_linear_reward_is_the_tilts_velocity(t: float) -> None:
    # r = 1/2 + k (x0 - m): old + E[(2 r - 1)(v - v_old) | x_t] / beta is the velocity of N(m + 2 k S / beta, S).
    points, weights = hermite_grid(12, 2)
    slope, beta = 0.05, 0.15
    spread = math.sqrt(OLD.variance(t))
    x_t = (1 - t) * OLD.mean + spread * points[:, :1]
    # x0 given x_t: its posterior, so the average over the second point is a conditional mean.
    posterior = math.sqrt(OLD.std**2 * t**2 / OLD.variance(t))
    x0 = OLD.x0(x_t, t) + posterior * points[:, 1:]
    probability = (0.5 + slope * (x0 - OLD.mean))[:, 0]
    aim = nft_target(OLD.velocity(x_t, t), (x_t - x0) / t, probability, nft_beta=beta).view(12, 12)
    conditional = (aim * weights.view(12, 12)).sum(dim=1) / weights.view(12, 12).sum(dim=1)
    tilted = Gaussian(OLD.mean + 2 * slope / beta * OLD.std**2, OLD.std)
    torch.testing.assert_close(conditional, tilted.velocity(x_t.view(12, 12)[:, 0], t), rtol=1e-9, atol=1e-9)


def test_mixture_of_the_branches_is_the_old_policy() -> None:
    # alpha v+ + (1 - alpha) v- = v_old, with v+- the conditional means of good and bad samples.
    old, target, noise = batch()
    probability = torch.sigmoid(noise[:, 0])
    alpha = probability.mean()
    good = (probability[:, None] * target).mean(dim=0) / alpha
    bad = ((1 - probability)[:, None] * target).mean(dim=0) / (1 - alpha)
    torch.testing.assert_close(alpha * good + (1 - alpha) * bad, target.mean(dim=0))
    step = (nft_target(old * 0 + target.mean(dim=0), target, probability, nft_beta=2.0)).mean(dim=0)
    # v* = v_old + (2 / beta) alpha (v+ - v_old).
    torch.testing.assert_close(step, target.mean(dim=0) + alpha * (good - target.mean(dim=0)))


def test_wrong_input() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        nft_loss(x, x, x, torch.tensor([0.5, 1.2]), nft_beta=1.0)
    with pytest.raises(ValueError, match="nft_beta"):
        nft_loss(x, x, x, torch.tensor([0.5, 0.5]), nft_beta=0.0)
    with pytest.raises(ValueError, match="not finite"):
        adaptive_nft_loss(x, x, x, torch.tensor([0.5, math.nan]), nft_beta=1.0)
    with pytest.raises(ValueError, match="one shape"):
        nft_loss(x, x[:1], x, torch.tensor([0.5, 0.5]), nft_beta=1.0)


@pytest.mark.parametrize(
    ("step", "plain", "late"), [(0, 0, 0), (75, 0.075, 0), (76, 0.076, 0.0075), (208, 0.208, 0.9975)]
)
def test_decay_tables(step: int, plain: float, late: float) -> None:
    assert ramped_decay(step) == pytest.approx(plain)
    assert ramped_decay(step, delay=75, slope=0.0075, ceiling=0.999) == pytest.approx(late)


def test_decay_ceilings_and_range() -> None:
    assert ramped_decay(900) == 0.5
    assert ramped_decay(500, delay=75, slope=0.0075, ceiling=0.999) == 0.999
    assert ramped_decay(10, start=0.25, slope=0.005, ceiling=0.999) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="start <= ceiling"):
        ramped_decay(0, start=0.6)
