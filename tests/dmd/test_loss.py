"""The matching loss and the fake-score loss: exact gradients, signs, reductions, stop-gradients and the floor."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.paths import add_noise, eps_from_velocity, x0_from_velocity
from fewstep.dmd.loss import (
    direction_normaliser,
    distribution_matching_loss,
    fake_score_error,
    fake_score_loss,
    fake_score_weight,
    matching_direction,
    matching_statistics,
    regression_loss,
)
from tests.dmd.gaussian_bench import (
    Gaussian,
    LinearGaussianDenoiser,
    guided,
    hermite_grid,
    mean_gradient,
    std_gradient,
    transport,
)

SHAPE = (3, 4, 5, 2)


def triple(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(x0 with gradient, fake_x0, real_x0)."""
    x0, fake, real = torch.randn(3, *shape, dtype=dtype)
    return x0.requires_grad_(), fake, real


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def test_gradient_is_the_normalised_direction_over_numel() -> None:
    x0, fake, real = triple()
    loss = distribution_matching_loss(x0, fake, real)
    normaliser = torch.stack([(x0[i] - real[i]).abs().mean() for i in range(3)]).detach()
    expected = (fake - real) / normaliser.view(3, 1, 1, 1)
    torch.testing.assert_close(gradient(loss, x0), expected / 120, rtol=1e-14, atol=0)
    assert loss.item() == pytest.approx(0.5 * float(expected.square().mean()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    # 64 elements, so that dividing by their number does not round.
    x0, fake, real = triple((2, 4, 4, 2), dtype)
    grad = gradient(distribution_matching_loss(x0, fake, real), x0)
    assert torch.equal(grad, matching_direction(x0, fake, real) / 64)


def test_small_directions_survive_fp32() -> None:
    x0 = torch.full((1, 64), 1000.0, requires_grad=True)
    real = torch.zeros(1, 64)
    fake = torch.full((1, 64), 1e-3)
    grad = gradient(distribution_matching_loss(x0, fake, real), x0)
    torch.testing.assert_close(grad, torch.full((1, 64), 1e-6 / 64), rtol=1e-6, atol=0)


def test_descent_moves_from_fake_to_real() -> None:
    x0 = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    fake, real = torch.full((1, 8), 0.5, dtype=torch.float64), torch.full((1, 8), 2.0, dtype=torch.float64)
    grad = gradient(distribution_matching_loss(x0, fake, real), x0)
    assert grad.flatten().tolist() == pytest.approx([(0.5 - 2.0) / 2.0 / 8] * 8)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-2, 1e2), offset=st.floats(-10, 10))
def test_gradient_ignores_units_and_offset(scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x0, fake, real = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    first, second = x0.clone().requires_grad_(), (scale * x0 + offset).requires_grad_()
    a = gradient(distribution_matching_loss(first, fake, real), first)
    b = gradient(distribution_matching_loss(second, scale * fake + offset, scale * real + offset), second)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_normaliser_is_per_sample() -> None:
    x0, fake, real = triple()
    before = gradient(distribution_matching_loss(x0, fake, real), x0)
    far = real.clone()
    far[2] += 100.0
    after = gradient(distribution_matching_loss(x0, fake, far), x0)
    assert torch.equal(before[:2], after[:2])
    assert direction_normaliser(x0, far).tolist() == pytest.approx(
        [float((x0.detach()[i] - far[i]).abs().mean()) for i in range(3)]
    )
    # One sample alone has the same normalised gradient, up to the mean over the batch.
    alone = x0[:1].detach().requires_grad_()
    grad = gradient(distribution_matching_loss(alone, fake[:1], real[:1]), alone)
    torch.testing.assert_close(grad / 3, before[:1], rtol=1e-12, atol=0)


def test_weight_scales_each_sample_and_one_changes_no_bit() -> None:
    x0, fake, real = triple()
    plain = gradient(distribution_matching_loss(x0, fake, real), x0)
    ones = gradient(distribution_matching_loss(x0, fake, real, weight=torch.ones(3)), x0)
    assert torch.equal(plain, ones)
    weight = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    scaled = gradient(distribution_matching_loss(x0, fake, real, weight=weight), x0)
    torch.testing.assert_close(scaled, plain * weight.view(3, 1, 1, 1), rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match=r"must be \[3\]"):
        distribution_matching_loss(x0, fake, real, weight=torch.ones(3, 1))


def test_only_x0_receives_a_gradient() -> None:
    x0, fake, real = triple()
    fake.requires_grad_()
    real.requires_grad_()
    distribution_matching_loss(x0, fake, real).backward()
    assert x0.grad is not None
    assert float(x0.grad.abs().sum()) > 0
    assert fake.grad is None
    assert real.grad is None


def test_exact_prediction_gives_a_finite_gradient_through_the_floor() -> None:
    x0 = torch.randn(2, 8, requires_grad=True)
    real = x0.detach().clone()
    zero = gradient(distribution_matching_loss(x0, real, real), x0)
    assert float(zero.abs().max()) == 0.0
    fake = real + 1e-4
    grad = gradient(distribution_matching_loss(x0, fake, real), x0)
    torch.testing.assert_close(grad, (fake - real) / 1e-5 / 16, rtol=1e-5, atol=0)
    statistics = matching_statistics(x0, fake, real)
    assert float(statistics.floored_share) == 1.0
    assert float(statistics.normaliser_mean) == pytest.approx(1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_non_finite_values_reach_loss_and_gradient(bad: float, place: int) -> None:
    tensors = [tensor.detach().clone() for tensor in triple()]
    tensors[place][1, 0, 0, 0] = bad
    x0 = tensors[0].requires_grad_()
    loss = distribution_matching_loss(x0, tensors[1], tensors[2])
    assert not math.isfinite(loss.item())
    grad = gradient(loss, x0)
    assert not bool(torch.isfinite(grad[1]).all())
    assert bool(torch.isfinite(grad[[0, 2]]).all())
    assert not math.isfinite(float(fake_score_loss(tensors[1], x0.detach(), tensors[2])))


def test_half_precision_is_computed_in_fp32() -> None:
    x0 = torch.full((1, 4096), 300.0, dtype=torch.bfloat16, requires_grad=True)
    real, fake = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bfloat16)
    loss = distribution_matching_loss(x0, fake, real)
    assert loss.dtype == torch.float32
    assert direction_normaliser(x0, real).dtype == torch.float32
    assert float(direction_normaliser(x0, real)) == 300.0
    grad = gradient(loss, x0)
    assert grad.dtype == torch.bfloat16
    assert float(grad[0, 0]) == pytest.approx(1 / 300 / 4096, rel=4e-3)


def test_shapes_must_agree() -> None:
    x0, fake, real = triple()
    with pytest.raises(ValueError, match=r"fake_x0 \(3, 1, 5, 2\)"):
        distribution_matching_loss(x0, fake[:, :1], real)
    with pytest.raises(ValueError, match=r"real_x0 \(1, 4, 5, 2\)"):
        matching_statistics(x0, fake, real[:1])
    with pytest.raises(ValueError, match=r"eps \(3, 4, 5, 1\)"):
        fake_score_loss(fake, real, x0[..., :1])
    with pytest.raises(ValueError, match="teacher_x0"):
        regression_loss(x0, real[:, :1])


@pytest.mark.parametrize("t", [0.02, 0.4, 0.98])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_gradient_of_a_gaussian_student(t: float, guidance: float) -> None:
    """G3, G4, G8: through the loss itself; quadrature weights times the normaliser turn its mean into E[d dx]."""
    teacher = guided(Gaussian(1.1, 1.3), Gaussian(0.5, 1.3), guidance)
    points, weights = hermite_grid(20, 2)
    mean = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    x0 = (mean + std * points[:, 0])[:, None]
    x_t = (1 - t) * x0.detach() + t * points[:, 1:]
    student = Gaussian(-0.4, 0.6)
    c, u = Gaussian(1.1, 1.3).x0(x_t, t), Gaussian(0.5, 1.3).x0(x_t, t)
    real, fake = u + guidance * (c - u), student.x0(x_t, t)
    weight = weights * len(weights) * direction_normaliser(x0, real)
    by_mean, by_std = torch.autograd.grad(distribution_matching_loss(x0, fake, real, weight=weight), (mean, std))
    assert float(by_mean) == pytest.approx(float(mean_gradient(student, teacher, t)), rel=1e-9)
    assert float(by_std) == pytest.approx(float(std_gradient(student, teacher, t)), rel=1e-9)
    assert float(by_mean) < 0


def test_optimal_two_step_student_has_no_gradient() -> None:
    """G12: a student whose steps are the transport maps has the teacher's law, so the exact direction is zero."""
    teacher = Gaussian(0.7, 1.3)
    points, _ = hermite_grid(10, 3)
    x0 = transport(teacher, points[:, :1], 1.0)
    x0 = transport(teacher, 0.5 * x0 + 0.5 * points[:, 1:2], 0.5).requires_grad_()
    x_t = 0.7 * x0.detach() + 0.3 * points[:, 2:]
    loss = distribution_matching_loss(x0, teacher.x0(x_t, 0.3), teacher.x0(x_t, 0.3))
    assert float(gradient(loss, x0).abs().max()) == 0.0


def test_fake_score_loss_value_and_stop_gradient() -> None:
    velocity, x0, eps = (part.clone().requires_grad_() for part in torch.randn(3, *SHAPE, dtype=torch.float64))
    loss = fake_score_loss(velocity, x0, eps)
    error = velocity.detach() - (eps - x0).detach()
    assert loss.item() == pytest.approx(float(error.square().mean()), rel=1e-12)
    slopes = torch.autograd.grad(loss, (velocity, x0, eps), allow_unused=True)
    torch.testing.assert_close(slopes[0], 2 * error / error.numel())
    assert slopes[1] is None
    assert slopes[2] is None
    assert fake_score_error(velocity, x0, eps).shape == (3,)
    weight = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    weighted = (error.square().flatten(1).mean(1) * weight).mean()
    assert fake_score_loss(velocity, x0, eps, weight=weight).item() == pytest.approx(float(weighted), rel=1e-12)


def test_fake_score_weights_are_those_of_x0_and_eps_errors() -> None:
    x0, eps, velocity = torch.randn(3, 4, 6, dtype=torch.float64)
    t = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    x_t = add_noise(x0, eps, t)
    by_x0 = (x0_from_velocity(x_t, velocity, t) - x0).square().mean()
    by_eps = (eps_from_velocity(x_t, velocity, t) - eps).square().mean()
    assert float(fake_score_loss(velocity, x0, eps, weight=fake_score_weight(t, target="x0"))) == pytest.approx(
        float(by_x0), rel=1e-12
    )
    assert float(fake_score_loss(velocity, x0, eps, weight=fake_score_weight(t, target="eps"))) == pytest.approx(
        float(by_eps), rel=1e-12
    )
    assert fake_score_weight(t, target="velocity").tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="'score' is unknown"):
        fake_score_weight(t, target="score")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("target", ["velocity", "x0", "eps"])
def test_fake_score_minimiser_is_the_student_denoiser(target: str) -> None:
    """G2: in exact expectation the gradient vanishes at the student's law for every weighting, and not beside it."""
    points, masses = hermite_grid(10, 2)
    t = torch.full((len(masses),), 0.35, dtype=torch.float64)
    x0, eps = -0.4 + 0.6 * points[:, :1], points[:, 1:]
    weight = masses * len(masses) * fake_score_weight(t, target=target)  # pyright: ignore[reportArgumentType]
    for mean, optimal in ((-0.4, True), (-0.3, False)):
        fake = LinearGaussianDenoiser(mean, 0.6, kind="posterior")
        loss = fake_score_loss(fake(add_noise(x0, eps, t), t), x0, eps, weight=weight)
        slopes = torch.autograd.grad(loss, (fake.mean, fake.log_std))
        assert (float(slopes[0].abs()) < 1e-12) == optimal
        assert float(slopes[0]) >= -1e-12
        assert float(slopes[1].abs()) < 1e-12 or not optimal


def test_regression_loss() -> None:
    x0, target, _ = triple()
    target.requires_grad_()
    loss = regression_loss(x0, target)
    assert loss.item() == pytest.approx((x0 - target).square().mean().item(), rel=1e-12)
    slopes = torch.autograd.grad(loss, (x0, target), allow_unused=True)
    torch.testing.assert_close(slopes[0], 2 * (x0 - target).detach() / x0.numel())
    assert slopes[1] is None


def test_statistics_are_those_of_the_tensors() -> None:
    x0, fake, real = triple()
    out = matching_statistics(x0, fake, real)
    grad = gradient(distribution_matching_loss(x0, fake, real), x0) * x0.numel()
    expected = {
        "direction_rms": (fake - real).square().mean().sqrt(),
        "gradient_rms": grad.square().mean().sqrt(),
        "normaliser_mean": (x0 - real).abs().mean(),
        "floored_share": torch.tensor(0.0),
        "student_mean": x0.mean(),
        "student_std": x0.var(correction=0).sqrt(),
        "fake_mean": fake.mean(),
        "fake_std": fake.var(correction=0).sqrt(),
        "teacher_mean": real.mean(),
        "teacher_std": real.var(correction=0).sqrt(),
    }
    for name, value in expected.items():
        got = getattr(out, name)
        assert got.shape == ()
        assert not got.requires_grad
        assert float(got) == pytest.approx(value.item(), rel=1e-12)


def test_chunks_of_a_video_have_a_normaliser_and_a_floor_each() -> None:
    """Closed form in float64; a chunk on which student and teacher agree stands at the floor, the other does not."""
    generator = torch.Generator().manual_seed(3)
    x0, fake, real = (torch.randn(2, 3, 5, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    real[:, :, :2] = x0[:, :, :2]
    weight = torch.tensor([2.0, 0.5], dtype=torch.float64)
    found = matching_direction(x0, fake, real, weight=weight, chunks=(2, 3), floor=0.25)
    size = (x0 - real)[:, :, 2:].abs().flatten(1).mean(dim=1)[:, None, None, None, None]
    factor = weight[:, None, None, None, None]
    expected = factor * torch.cat([(fake - real)[:, :, :2] / 0.25, (fake - real)[:, :, 2:] / size], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    for chunks in ((2, 2), (5, 1)):
        with pytest.raises(ValueError, match="they must add up to the frames"):
            matching_direction(x0, fake, real, chunks=chunks)
