"""Adversarial losses: chance level, optimum at the log density ratio, directions, and the approximate R1 penalty."""

import math

import pytest
import torch

from fewstep.dmd.gan_loss import approximate_r1_penalty, discriminator_loss, generator_gan_loss, perturb_noised_input
from tests.dmd.gaussian_bench import Gaussian, hermite_grid, log_ratio

STUDENT, TEACHER, T = Gaussian(0.2, 1.1), Gaussian(0.7, 1.3), 0.5


def test_values_at_chance() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2), rel=1e-12)
    assert float(generator_gan_loss(zero)) == pytest.approx(math.log(2), rel=1e-12)


def test_gradients_push_the_right_way() -> None:
    fake = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    real = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    by_fake, by_real = torch.autograd.grad(discriminator_loss(fake, real), (fake, real))
    torch.testing.assert_close(by_fake, torch.sigmoid(fake.detach()) / 2)
    torch.testing.assert_close(by_real, -torch.sigmoid(-real.detach()) / 2)
    (by_student,) = torch.autograd.grad(generator_gan_loss(fake), fake)
    torch.testing.assert_close(by_student, -torch.sigmoid(-fake.detach()) / 2)


def test_discriminator_optimum_is_the_log_density_ratio() -> None:
    """G9: at logit = log p_real / p_student no change of an affine-quadratic logit lowers the exact expected loss."""
    points, weights = hermite_grid(60, 1)
    coefficients = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def logit(x: torch.Tensor) -> torch.Tensor:
        basis = torch.stack([torch.ones_like(x), x, x.square()])
        return log_ratio(STUDENT, TEACHER, x, T) + coefficients @ basis

    def nodes(data: Gaussian) -> torch.Tensor:
        return (1 - T) * data.mean + math.sqrt(float(data.variance(T))) * points[:, 0]

    # The loss is a mean over the batch; one call per node takes the quadrature weights instead.
    fake, real = logit(nodes(STUDENT)), logit(nodes(TEACHER))
    zero = torch.zeros(1, dtype=torch.float64)
    loss = torch.stack(
        [w * discriminator_loss(f[None], r[None]) for w, f, r in zip(weights, fake, real, strict=True)]
    ).sum()
    (slope,) = torch.autograd.grad(loss, coefficients)
    assert float(slope.abs().max()) < 1e-6
    assert loss.item() < float(discriminator_loss(zero, zero))


def test_patch_logits_count_alike_and_half_precision_is_fp32() -> None:
    fake, real = torch.randn(2, 3, 4, 4).bfloat16().unbind()
    loss = discriminator_loss(fake, real)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(discriminator_loss(fake.flatten(), real.flatten())), rel=1e-6)
    large = torch.tensor([1e4], dtype=torch.bfloat16)
    assert float(discriminator_loss(large, -large)) == pytest.approx(2e4, rel=1e-2)
    assert float(discriminator_loss(-large, large)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_propagate(bad: float) -> None:
    logits = torch.tensor([0.0, bad])
    assert not math.isfinite(float(discriminator_loss(logits, torch.zeros(2))))
    assert not math.isfinite(float(generator_gan_loss(-logits)))
    assert not math.isfinite(float(approximate_r1_penalty(logits, torch.zeros(2))))


def test_approximate_r1_is_the_squared_gradient() -> None:
    """For a linear logit the expectation over the noise is scale^2 |gradient|^2, by quadrature over 2 elements."""
    points, weights = hermite_grid(6, 2)
    slope = torch.tensor([0.7, -1.9], dtype=torch.float64, requires_grad=True)
    x_t = torch.randn(1, 2, dtype=torch.float64).expand(36, 2)
    moved = perturb_noised_input(x_t, points, scale=0.1)
    penalties = [approximate_r1_penalty(a[None], b[None]) for a, b in zip(x_t @ slope, moved @ slope, strict=True)]
    penalty = (weights * torch.stack(penalties)).sum()
    assert penalty.item() == pytest.approx(0.01 * (0.7**2 + 1.9**2), rel=1e-9)
    (grad,) = torch.autograd.grad(penalty, slope)
    torch.testing.assert_close(grad, 2 * 0.01 * slope.detach())


def test_perturbation_and_its_errors() -> None:
    x_t, noise = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert perturb_noised_input(x_t, noise).flatten().tolist() == pytest.approx([1.2] * 6)
    with pytest.raises(ValueError, match="shape of x_t"):
        perturb_noised_input(x_t, noise[:1])
    with pytest.raises(ValueError, match="positive"):
        perturb_noised_input(x_t, noise, scale=0.0)
    with pytest.raises(ValueError, match="one shape"):
        approximate_r1_penalty(torch.zeros(2), torch.zeros(2, 1))
