"""Centred reward distillation: implicit rewards, centring by prompt, and the temperature at one time."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.dmd.reward.inputs import group_sum
from fewstep.dmd.reward.methods.crd import (
    centring_weights,
    crd_loss,
    implicit_reward,
    reward_adaptive_penalty,
)
from tests.dmd.gaussian_bench import Gaussian, hermite_grid

OLD = Gaussian(0.4, 1.2)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(count: int = 6, width: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_implicit_reward_golden_and_gradient() -> None:
    velocity, old, target = tensor(3.0, 1.0)[None], tensor(0.0, 0.0)[None], tensor(1.0, 1.0)[None]
    assert float(implicit_reward(velocity, old, target)) == pytest.approx((2.0 - 4.0) / 2)
    assert float(implicit_reward(velocity, old, target, reduction="sum")) == pytest.approx(-2.0)
    # Mean errors 2 and 1 divided by mean absolute errors 1 and 1.
    assert float(implicit_reward(velocity, old, target, adaptive=True)) == pytest.approx(1.0 - 2.0)
    assert float(implicit_reward(velocity, old, target, weight=tensor(3.0))) == pytest.approx(-3.0)
    velocity, old, target = (x.requires_grad_() for x in batch())
    implicit_reward(velocity, old, target, adaptive=True).sum().backward()
    assert velocity.grad is not None
    assert float(velocity.grad.abs().min()) > 0
    assert [old.grad, target.grad] == [None, None]
    with pytest.raises(ValueError, match="weight per sample"):
        implicit_reward(velocity, old, target, weight=tensor(1.0))


def test_at_the_old_policy_the_loss_is_the_external_variance() -> None:
    velocity, _, target = batch()
    implicit, group = implicit_reward(velocity, velocity, target), torch.tensor([0, 0, 0, 1, 1, 1])
    external = tensor(0.1, 0.2, 0.6, 0.5, 0.5, 0.8)
    centred = external - tensor(0.3, 0.3, 0.3, 0.6, 0.6, 0.6)
    loss = crd_loss(implicit, external, group, crd_beta=0.5)
    assert loss.item() == pytest.approx(10 * float(centred.square().mean()))
    shifted = crd_loss(implicit, external + 0.2 * group, group, crd_beta=0.5)
    assert float(shifted) == pytest.approx(loss.item())
    balanced = crd_loss(implicit, torch.full((6,), 0.4), group, form="bce")
    assert float(balanced) == pytest.approx(5 * math.log(2))


def test_prompts_are_not_mixed() -> None:
    implicit, external = tensor(0.0, 0.4, 1.0, 1.4), tensor(0.0, 0.4, 0.5, 0.9)
    # Each prompt's differences agree, so grouped the loss is zero; centred over everything it is not.
    assert float(crd_loss(implicit, external, torch.tensor([0, 0, 1, 1]))) == pytest.approx(0.0, abs=1e-15)
    assert float(crd_loss(implicit, external, torch.tensor([0, 0, 0, 0]))) > 0.1


def test_detached_centre_changes_no_gradient_with_uniform_weights() -> None:
    implicit, external, group = tensor(0.3, -0.2, 0.9).requires_grad_(), tensor(0.1, 0.5, 0.6), torch.zeros(3).long()
    (gradient,) = torch.autograd.grad(crd_loss(implicit, external, group, crd_beta=2.0), implicit)
    centred = 2.0 * (implicit - implicit.mean())
    free = 2.5 * (centred - (external - external.mean())).square().mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(free, implicit)[0])


@pytest.mark.parametrize("temperature", [math.inf, 1.0, 1e-3])
def test_centring_weights_sum_to_one_in_each_group(temperature: float) -> None:
    external, group = tensor(0.0, 0.1, 0.2, 0.9, 1.0), torch.tensor([4, 4, 4, 2, 2])
    weights = centring_weights(external, group, temperature=temperature)
    torch.testing.assert_close(group_sum(weights, group), torch.ones(5, dtype=torch.float64))
    if temperature == 1e-3:
        assert weights.tolist() == pytest.approx([0.5, 0.0, 0.5, 0.5, 0.5])
    if temperature == 1.0:
        up = math.exp(0.9) / (math.exp(0.9) + math.exp(1.0))
        assert weights[3:].tolist() == pytest.approx([0.5, 0.5])
        assert up < 0.5


def fitted_shift(t: float, *, shared_noise: bool) -> float:
    """delta of the mean-shifted policy that minimises the loss with draws at one t, slope 0.05, beta 0.3."""
    points, _ = hermite_grid(2, 1)
    # Two-point rules have the moments of a normal up to the third, and equal weights.
    z = points.repeat_interleave(2, dim=0)
    eps = torch.ones_like(z) if shared_noise else points.repeat(2, 1)
    x0 = OLD.sample(z)
    x_t, times = add_noise(x0, eps, torch.full((4,), t, dtype=torch.float64)), t
    external, group = 0.5 + 0.05 * (x0 - OLD.mean)[:, 0], torch.zeros(4).long()

    def gradient(shift: float) -> float:
        delta = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
        policy = Gaussian(OLD.mean + delta, OLD.std)
        implicit = implicit_reward(policy.velocity(x_t, times), OLD.velocity(x_t, times), eps - x0)
        return float(torch.autograd.grad(crd_loss(implicit, external, group, crd_beta=0.3), delta)[0])

    # The centred implicit reward is linear in delta, so the gradient is too and one secant step ends at its zero.
    start, after = gradient(0.0), gradient(0.1)
    return -0.1 * start / (after - start)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_one_time_has_its_own_temperature_and_noise_shrinks_it(t: float) -> None:
    shared = 0.05 * OLD.variance(t) ** 2 / (2 * 0.3 * t**2)
    assert fitted_shift(t, shared_noise=True) == pytest.approx(shared)
    # Noise of its own for each sample attenuates by t^2 / D (errors in the regressor).
    assert fitted_shift(t, shared_noise=False) == pytest.approx(shared * t**2 / OLD.variance(t))


def test_adaptive_penalty_golden() -> None:
    value = reward_adaptive_penalty(tensor(1.0, 2.0, 4.0), tensor(0.0, 0.5, 1.0), kl_weight=0.1, lowest_weight=0.02)
    assert float(value) == pytest.approx((0.02 + 0.12 + 0.4) / 3)


def test_wrong_input() -> None:
    group, good = torch.zeros(2).long(), torch.zeros(2)
    with pytest.raises(ValueError, match=r"external rewards of samples \[1\]"):
        crd_loss(good, torch.tensor([0.0, math.nan]), group)
    with pytest.raises(ValueError, match=r"implicit rewards of samples \[0\]"):
        crd_loss(torch.tensor([math.inf, 0.0]), good, group)
    with pytest.raises(ValueError, match="crd_beta"):
        crd_loss(good, good, group, crd_beta=0.0)
    with pytest.raises(ValueError, match="temperature"):
        crd_loss(good, good, group, temperature=0.0)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        reward_adaptive_penalty(good, torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match="lowest_weight"):
        reward_adaptive_penalty(good, good, kl_weight=0.0)
