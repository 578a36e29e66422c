"""Each closed form G1 to G15 of the Gaussian bench against quadrature or autograd, in fp64."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, score_from_velocity, x0_from_velocity
from fewstep.dmd.loss import direction_normaliser
from tests.dmd.gaussian_bench import (
    Gaussian,
    GaussianDenoiser,
    LinearGaussianDenoiser,
    forward_kl_mean_gradient,
    guided,
    hermite_grid,
    log_ratio,
    martingale_residual,
    matched_cosine,
    mean_gradient,
    normaliser_limit,
    reverse_kl,
    reverse_kl_gradients,
    std_gradient,
    subinterval,
    subinterval_target,
    transition,
    transition_coefficient,
    transport,
)

TEACHER = Gaussian(0.7, 1.3)
STUDENT = Gaussian(-0.4, 0.6)
TIMES = (0.02, 0.25, 0.6, 0.98)


def noised(data: Gaussian, t: float, order: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, x, x_t, weights): latent, sample and noised sample on a quadrature grid over (z, eps)."""
    points, weights = hermite_grid(order, 2)
    x = data.sample(points[:, 0])
    return points[:, 0], x, (1 - t) * x + t * points[:, 1], weights


def near(value: float | Tensor, tolerance: float = 1e-10):
    return pytest.approx(float(value), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("data", [TEACHER, STUDENT])
def test_g1_g2_denoiser_velocity_and_score(data: Gaussian, t: float) -> None:
    _, x, x_t, weights = noised(data, t)
    prediction = data.x0(x_t, t)
    # The posterior mean leaves a residual that no function of x_t explains, here its first three powers.
    for power in range(3):
        assert float((weights * (x - prediction) * x_t**power).sum()) == near(0.0)
    times = torch.full((x_t.numel(),), t, dtype=torch.float64)
    velocity = data.velocity(x_t, t)
    torch.testing.assert_close(x0_from_velocity(x_t, velocity, times), prediction, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(score_from_velocity(x_t, velocity, times), data.score(x_t, t), rtol=1e-9, atol=1e-9)
    leaf = x_t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(data.log_density(leaf, t).sum(), leaf)
    torch.testing.assert_close(data.score(x_t, t), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_g3_g4_g5_direction_is_the_weighted_kl_gradient(t: float) -> None:
    z, _, x_t, weights = noised(STUDENT, t)
    direction = STUDENT.x0(x_t, t) - TEACHER.x0(x_t, t)
    by_mean, by_std = float((weights * direction).sum()), float((weights * direction * z).sum())
    assert by_mean == near(mean_gradient(STUDENT, TEACHER, t))
    assert by_std == near(std_gradient(STUDENT, TEACHER, t))
    # The student lies below the teacher and is narrower: descent along d raises both.
    assert by_mean < 0
    assert by_std < 0
    mean = torch.tensor(STUDENT.mean, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(STUDENT.std, dtype=torch.float64, requires_grad=True)
    slopes = torch.autograd.grad(torch.as_tensor(reverse_kl(Gaussian(mean, std), TEACHER, t)), (mean, std))
    closed = reverse_kl_gradients(STUDENT, TEACHER, t)
    for slope, form, value in zip(slopes, closed, (by_mean, by_std), strict=True):
        assert float(slope) == near(form)
        assert value == near(t**2 / (1 - t) ** 2 * float(slope))


def test_g5_reverse_kl_is_the_integral() -> None:
    t = 0.4
    _, _, x_t, weights = noised(STUDENT, t)
    integral = (weights * -log_ratio(STUDENT, TEACHER, x_t, t)).sum()
    assert float(integral) == near(reverse_kl(STUDENT, TEACHER, t))


@pytest.mark.parametrize("t", TIMES)
def test_g6_equal_student_gives_zero_and_a_stale_fake_score_does_not(t: float) -> None:
    z, _, x_t, weights = noised(TEACHER, t)
    real = TEACHER.x0(x_t, t)
    assert float((TEACHER.x0(x_t, t) - real).abs().max()) == 0.0
    stale_mean = Gaussian(TEACHER.mean + 0.2, TEACHER.std).x0(x_t, t) - real
    assert float((weights * stale_mean).sum()) == near(0.2 * t**2 / TEACHER.variance(t))
    wide = Gaussian(TEACHER.mean, 1.5)
    stale_std = wide.x0(x_t, t) - real
    pull = (1 - t) ** 2 * t**2 * 1.3 * (1.5**2 - 1.3**2) / (wide.variance(t) * TEACHER.variance(t))
    assert float((weights * stale_std).sum()) == near(0.0)
    assert float((weights * stale_std * z).sum()) == near(pull)
    assert float(pull) > 0


@pytest.mark.parametrize("t", [0.1, 0.5, 0.98])
def test_g7_normaliser_in_many_dimensions(t: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 1, 1_000_000, generator=generator, dtype=torch.float64)
    x = TEACHER.sample(z)
    real = TEACHER.x0((1 - t) * x + t * eps, t)
    assert float(direction_normaliser(x, real)) == pytest.approx(normaliser_limit(TEACHER, t), rel=3e-3)
    # The residual is normal, so its mean absolute value is sqrt(2 / pi) of its std, and the std is exact here.
    _, x, x_t, weights = noised(TEACHER, t)
    std = (weights * (x - TEACHER.x0(x_t, t)) ** 2).sum().sqrt()
    assert math.sqrt(2 / math.pi) * float(std) == near(normaliser_limit(TEACHER, t))


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.75, 8.0])
def test_g8_guided_denoiser_is_that_of_a_shifted_gaussian(t: float, guidance: float) -> None:
    conditional, unconditional = Gaussian(1.1, 1.3), Gaussian(0.5, 1.3)
    x_t = torch.linspace(-6, 6, 41, dtype=torch.float64)
    c, u = conditional.x0(x_t, t), unconditional.x0(x_t, t)
    target = guided(conditional, unconditional, guidance)
    assert float(target.mean) == near(0.5 + guidance * 0.6)
    torch.testing.assert_close(u + guidance * (c - u), target.x0(x_t, t), rtol=1e-12, atol=1e-12)
    v_c, v_u = conditional.velocity(x_t, t), unconditional.velocity(x_t, t)
    torch.testing.assert_close(v_u + guidance * (v_c - v_u), target.velocity(x_t, t), rtol=1e-12, atol=1e-12)
    # The other convention, c + w (c - u), is off by one whole c - u.
    gap = (c + guidance * (c - u) - target.x0(x_t, t)).mean()
    assert float(gap) == near(0.6 * t**2 / TEACHER.variance(t))


@pytest.mark.parametrize("t", [0.25, 0.6, 0.98])
def test_g9_density_ratio(t: float) -> None:
    student = Gaussian(0.2, 1.1)
    _, _, x_t, weights = noised(student, t, order=80)
    logit = log_ratio(student, TEACHER, x_t, t)
    difference = TEACHER.log_density(x_t, t) - student.log_density(x_t, t)
    torch.testing.assert_close(logit, difference, rtol=1e-11, atol=1e-11)
    assert float((weights * logit.exp()).sum()) == near(1.0, 1e-6)


@pytest.mark.parametrize("t", [0.25, 0.6, 0.98])
def test_g10_ratio_weighted_direction_is_the_forward_kl_gradient(t: float) -> None:
    student = Gaussian(0.2, 1.1)
    _, _, x_t, weights = noised(student, t, order=80)
    ratio = log_ratio(student, TEACHER, x_t, t).exp()
    integral = (weights * ratio * (1 - t) * (student.score(x_t, t) - TEACHER.score(x_t, t))).sum()
    assert float(integral) == near(forward_kl_mean_gradient(student, TEACHER, t), 1e-6)
    mean = torch.tensor(student.mean, dtype=torch.float64, requires_grad=True)
    divergence = torch.as_tensor(reverse_kl(TEACHER, Gaussian(mean, student.std), t))
    (slope,) = torch.autograd.grad(divergence, mean)
    assert float(slope) == near(forward_kl_mean_gradient(student, TEACHER, t))


@pytest.mark.parametrize("t", TIMES)
def test_g11_score_projection(t: float) -> None:
    _, x, x_t, weights = noised(STUDENT, t)
    fake, real = STUDENT.x0(x_t, t), TEACHER.x0(x_t, t)
    assert float((weights * (real - fake) * (x - fake)).sum()) == near(0.0)


def test_g12_transport_keeps_the_teacher_at_every_step() -> None:
    times = (1.0, 0.75, 0.5, 0.25)
    points, weights = hermite_grid(12, 2)
    carried = TEACHER
    for t in times:
        state = (1 - t) * carried.sample(points[:, 0]) + t * points[:, 1]
        x0 = transport(TEACHER, state, t)
        mean = float((weights * x0).sum())
        carried = Gaussian(mean, math.sqrt(float((weights * (x0 - mean) ** 2).sum())))
        assert carried.mean == near(0.7)
        assert carried.std == near(1.3)


def test_g12_iterated_posterior_means_collapse() -> None:
    carried = TEACHER
    for t in (1.0, 0.75, 0.5, 0.25):
        gain = (1 - t) * TEACHER.std**2 / TEACHER.variance(t)
        carried = Gaussian(0.7, gain * math.sqrt(carried.variance(t)))
    assert float(carried.std) == pytest.approx(0.72, abs=0.01)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.3, 0.6), (0.6, 0.95)])
def test_g13_subinterval_target_regresses_to_the_velocity(s: float, t: float) -> None:
    points, weights = hermite_grid(8, 3)
    x_s = (1 - s) * STUDENT.sample(points[:, 0]) + s * points[:, 1]
    scale, level = subinterval(s, t)
    x_t = scale * x_s + level * points[:, 2]
    variance = (weights * x_t**2).sum() - (weights * x_t).sum() ** 2
    assert float(variance) == near(STUDENT.variance(t))
    residual = subinterval_target(x_s, points[:, 2], s, t) - STUDENT.velocity(x_t, t)
    for power in range(3):
        assert float((weights * residual * x_t**power).sum()) == near(0.0)
    if s == 0.0:
        torch.testing.assert_close(subinterval_target(x_s, points[:, 2], s, t), points[:, 2] - x_s)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.6), (0.6, 0.0), (0.99, 0.98)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9, 1.0])
def test_g14_transition_difference(t: float, s: float, eta: float) -> None:
    x_t, noise = torch.randn(2, 16, dtype=torch.float64)
    fake, real = STUDENT.velocity(x_t, t), TEACHER.velocity(x_t, t)
    steps = [transition(x_t, v, t, s, eta=eta, noise=noise) for v in (fake, real)]
    coefficient = transition_coefficient(t, s, eta=eta)
    torch.testing.assert_close(steps[0] - steps[1], coefficient * (fake - real), rtol=1e-9, atol=1e-12)
    assert coefficient < 0
    if eta == 0.0:
        assert coefficient == near(s - t)
    if s == 0.0:
        assert coefficient == near(-t)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.7), (0.5, 0.2)])
@pytest.mark.parametrize("eta", [0.0, 0.9, 1.0, None])
def test_g15_martingale_residual(t: float, s: float, eta: float | None) -> None:
    cosine = matched_cosine(t, s) if eta is None else math.cos(eta * math.pi / 2)
    eta = math.acos(cosine) * 2 / math.pi
    points, weights = hermite_grid(12, 2)
    x_t = (1 - t) * STUDENT.mean + math.sqrt(float(STUDENT.variance(t))) * points[:, 0]
    step = transition(x_t, STUDENT.velocity(x_t, t), t, s, eta=eta, noise=points[:, 1])
    change = (weights * (STUDENT.x0(step, s) - STUDENT.x0(x_t, t))).view(12, 12)
    mass = weights.view(12, 12).sum(dim=1)
    rms = (mass * (change.sum(dim=1) / mass) ** 2).sum().sqrt()
    expected = martingale_residual(STUDENT, t, s, cosine=cosine)
    assert float(rms) == near(expected, 1e-8)
    assert (expected < 1e-12) == (cosine == matched_cosine(t, s))


def test_denoiser_modules_match_the_closed_forms() -> None:
    x_t = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    tokens = torch.tensor([[[0.3]], [[-1.0]], [[0.0]], [[2.0]], [[0.5]]], dtype=torch.float64)
    exact = GaussianDenoiser(0.7, 1.3, token_gain=2.0)
    posterior = LinearGaussianDenoiser(0.7, 1.3, kind="posterior", token_gain=2.0)
    student = LinearGaussianDenoiser(0.7, 1.3, kind="transport", token_gain=2.0)
    for condition in (None, Condition(tokens)):
        torch.testing.assert_close(posterior(x_t, t, condition), exact(x_t, t, condition), rtol=1e-12, atol=1e-12)
        for i in range(5):
            shift = 0.0 if condition is None else 2.0 * float(tokens[i, 0, 0])
            data, time = Gaussian(0.7 + shift, 1.3), float(t[i])
            torch.testing.assert_close(exact.x0(x_t, t, condition)[i], data.x0(x_t[i], time))
            torch.testing.assert_close(student.x0(x_t, t, condition)[i], transport(data, x_t[i], time))
        assert bool(torch.isfinite(student(x_t, t, condition)).all())


def test_guidance_with_a_zero_token_scales_the_token() -> None:
    denoiser = GaussianDenoiser(0.7, 1.3, token_gain=0.5)
    x_t, t = torch.randn(4, 6, dtype=torch.float64), torch.full((4,), 0.4, dtype=torch.float64)
    tokens = torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64).view(4, 1, 1)
    null = Condition(torch.zeros(1, 1, 1, dtype=torch.float64)).expand(4)
    c, u = denoiser(x_t, t, Condition(tokens)), denoiser(x_t, t, null)
    wide = GaussianDenoiser(0.7, 1.3, token_gain=0.5 * 3.5)
    torch.testing.assert_close(u + 3.5 * (c - u), wide(x_t, t, Condition(tokens)), rtol=1e-12, atol=1e-12)


def test_parameters_belong_to_the_nearest_time() -> None:
    denoiser = LinearGaussianDenoiser(0.0, 1.0, kind="transport", times=(1.0, 0.5))
    with torch.no_grad():
        denoiser.mean.copy_(torch.tensor([3.0, -2.0]))
    x, t = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    x_t = add_noise(x, torch.zeros_like(x), t)
    data = denoiser.gaussian(x_t, t)
    assert torch.as_tensor(data.mean).flatten().tolist() == [3.0, -2.0]
    assert denoiser.x0(x_t, t)[0, 0].item() == pytest.approx(3.0)
