"""Guided transitions, what part of the tilt they reach, and two kinds of advantages."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.dmd.reward.chain import clipped_surrogate
from fewstep.dmd.reward.flow_sde import Transition, sde_transition, transition_log_prob
from fewstep.dmd.reward.methods.euphonium import (
    dual_surrogate,
    guidance_distillation_loss,
    guided_transition,
    langevin_scale,
    process_gradient,
    step_scale,
    tilted_velocity,
    unit_gradient,
)
from tests.dmd.gaussian_bench import Gaussian, hermite_grid

TEACHER = Gaussian(0.4, 1.2)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_step() -> tuple[Tensor, Transition]:
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    t = tensor(0.8, 0.5)
    velocity = TEACHER.velocity(x, t[:, None])
    return x, sde_transition(x, velocity, t, t - 0.1, diffusion=torch.full_like(t, 0.3))


def test_scales() -> None:
    t, t_next = tensor(0.8, 0.5), tensor(0.6, 0.4)
    assert step_scale(t, t_next, guidance=0.1).tolist() == pytest.approx([0.02, 0.01])
    # g^2 step / (2 kl_weight) with kl_weight 0.5.
    assert langevin_scale(t, t_next, tensor(0.3, 0.3), tilt_scale=2.0).tolist() == pytest.approx([0.018, 0.009])


def test_zero_guidance_is_exact_and_a_linear_reward_shifts_the_mean_alone() -> None:
    _, step = make_step()
    slope = torch.full((2, 3), 1.5, dtype=torch.float64)
    assert torch.equal(guided_transition(step, slope, tensor(0.0, 0.0)).mean, step.mean)
    guided = guided_transition(step, slope, tensor(0.2, 0.1))
    torch.testing.assert_close(guided.mean - step.mean, tensor(0.3, 0.15).view(2, 1).expand(2, 3))
    assert guided.std is step.std
    with pytest.raises(ValueError, match=r"reward gradients of samples \[1\]"):
        guided_transition(step, torch.tensor([[0.0] * 3, [math.nan] * 3]), tensor(0.1, 0.1))


def test_reward_gradient_has_no_path_to_the_policy() -> None:
    x, step = make_step()
    leaf = x.detach().requires_grad_()
    gradient = process_gradient((leaf * leaf).sum(dim=1), leaf)
    torch.testing.assert_close(gradient, 2 * x.detach())
    mean = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    source = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    guided_transition(Transition(mean, step.std), source, tensor(0.1, 0.1)).mean.sum().backward()
    assert source.grad is None
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == [1.0] * 6
    with pytest.raises(ValueError, match="must depend on x_t"):
        process_gradient(torch.zeros(2), leaf)
    with pytest.raises(ValueError, match=r"process rewards of samples \[0\]"):
        process_gradient(leaf.sum(dim=1) / tensor(0.0, 1.0), leaf)


def test_tilted_velocity_is_the_tilts_own() -> None:
    # R = log E[e^{lambda a x0} | x_t] has gradient lambda a (1 - t) S / D.
    slope, scale = 0.5, 0.8
    tilted = Gaussian(TEACHER.mean + scale * slope * TEACHER.std**2, TEACHER.std)
    x = torch.linspace(-2, 3, 5, dtype=torch.float64).view(5, 1)
    t = tensor(0.02, 0.3, 0.5, 0.8, 0.99)
    gradient = (slope * (1 - t) * TEACHER.std**2 / TEACHER.variance(t))[:, None]
    found = tilted_velocity(TEACHER.velocity(x, t[:, None]), gradient, t, tilt_scale=scale)
    torch.testing.assert_close(found, tilted.velocity(x, t[:, None]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        tilted_velocity(x, x, torch.ones(5), tilt_scale=1.0)


def test_unit_gradient() -> None:
    unit = unit_gradient(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert unit.flatten().tolist() == pytest.approx([0.6, 0.8, 0.0, 0.0])


def test_unguided_log_prob_of_guided_samples_carries_the_drift() -> None:
    # E[d log pi_unguided(x') / d mean] over guided samples is scale grad R / std^2: the pull towards the guidance.
    points, weights = hermite_grid(6, 1)
    mean = torch.zeros(6, 1, dtype=torch.float64, requires_grad=True)
    step = Transition(mean, tensor(0.5))
    x = guided_transition(step, torch.full((6, 1), 1.5).double(), torch.full((6,), 0.2).double()).draw(points)
    log_prob = transition_log_prob(x, step)
    (weights * log_prob).sum().backward()
    assert mean.grad is not None
    assert float(mean.grad.sum()) == pytest.approx(0.3 / 0.25)


def test_dual_surrogate_parts() -> None:
    log_ratio = tensor(0.0, 0.0).requires_grad_()
    total, outcome, process = dual_surrogate(log_ratio, tensor(1.0, -3.0), tensor(0.0, 0.0), process_weight=7.0)
    assert total.item() == pytest.approx(1.0)
    assert (outcome.loss.item(), process.loss.item()) == (1.0, 0.0)
    both, _, _ = dual_surrogate(log_ratio, tensor(1.0, -3.0), tensor(2.0, 2.0), outcome_weight=0.5, process_weight=2.0)
    (gradient,) = torch.autograd.grad(both, log_ratio)
    single = clipped_surrogate(log_ratio, tensor(4.5, 2.5), clip_range=1e-4).loss
    torch.testing.assert_close(gradient, torch.autograd.grad(single, log_ratio)[0])


@pytest.mark.parametrize("std", [0.2, 1.5])
def test_distillation_rests_at_the_guided_mean(std: float) -> None:
    """R(x) = a x: the quadratic's minimiser, one Newton step from anywhere, is mean + scale a, whatever the std."""
    slope, scale = tensor(0.7, -1.1), tensor(0.3, 0.3)
    x_t = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    unguided = tensor(0.4, -0.2).expand(2, 2)
    target = guided_transition(Transition(unguided, tensor(std)), process_gradient(x_t @ slope, x_t), scale).mean
    mean = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    loss = guidance_distillation_loss(Transition(mean, tensor(std)), target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, mean)
    # The curvature is 1 / (batch std^2).
    torch.testing.assert_close(mean.detach() - 2 * std**2 * gradient, unguided + 0.3 * slope, rtol=1e-12, atol=1e-12)


def test_distillation_moves_the_mean_to_the_guidance() -> None:
    mean = tensor(0.0, 1.0)[None].requires_grad_()
    target = tensor(0.5, 1.0)[None].requires_grad_()
    loss = guidance_distillation_loss(Transition(mean, tensor(0.5)), target)
    loss.backward()
    assert loss.item() == pytest.approx(0.25 / 0.5 / 2)
    assert mean.grad is not None
    assert mean.grad.flatten().tolist() == pytest.approx([-0.5 / 0.25 / 2, 0.0])
    assert target.grad is None
