"""Sub-interval matching and the consistency regulariser against the closed forms G13 to G15."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.paths import add_noise, eps_from_velocity
from fewstep.dmd.loss import distribution_matching_loss, fake_score_loss
from fewstep.dmd.reward.flow_sde import cps_transition
from fewstep.dmd.reward.methods.ac_dmd import (
    add_subinterval_noise,
    ambient_fake_score_loss,
    ambient_target,
    consistency_regulariser,
    martingale_noise,
    reverse_move,
    sample_subinterval_times,
    subinterval_coefficients,
    subinterval_matching_loss,
)
from tests.dmd.gaussian_bench import (
    Gaussian,
    hermite_grid,
    martingale_residual,
    matched_cosine,
    subinterval,
    subinterval_target,
    transition_coefficient,
)

TEACHER, STUDENT = Gaussian(0.7, 1.3), Gaussian(-0.4, 0.6)


def transition_gain(s: Tensor, t: Tensor, *, cosine: float) -> Tensor:
    """s cos (1 - t) - (1 - s) t, [B]: change of the state at s per change of velocity at t; -t for s = 0."""
    return s * cosine * (1 - t) - (1 - s) * t


def full(value: float, count: int = 1) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


@given(st.floats(0.0, 0.9), st.floats(0.01, 0.99))
def test_coefficients_and_target_equal_the_bench(s: float, fraction: float) -> None:
    t = s + fraction * (0.99 - s)
    scale, level = subinterval_coefficients(full(s), full(t))
    assert (float(scale), float(level)) == pytest.approx(subinterval(s, t), rel=1e-6)
    # The noise level of the original sample is t again.
    assert float(scale**2 * s**2 + level**2) == pytest.approx(t**2)
    x_s, noise = torch.tensor([[0.3, -2.0]], dtype=torch.float64), torch.tensor([[1.1, 0.4]], dtype=torch.float64)
    target = ambient_target(x_s, noise, full(s), full(t))
    torch.testing.assert_close(target, subinterval_target(x_s, noise, s, t), rtol=1e-6, atol=1e-6)


def test_target_is_the_time_derivative_and_flow_matching_at_zero() -> None:
    x_s, noise = torch.tensor([[0.3, -2.0]], dtype=torch.float64), torch.tensor([[1.1, 0.4]], dtype=torch.float64)
    for s, t in ((0.0, 0.3), (0.5, 0.7)):
        after, before = (add_subinterval_noise(x_s, noise, full(s), full(t + step)) for step in (1e-6, -1e-6))
        target = ambient_target(x_s, noise, full(s), full(t))
        torch.testing.assert_close(target, (after - before) / 2e-6, rtol=1e-7, atol=1e-7)
    zero, t = full(0.0), full(0.6)
    torch.testing.assert_close(ambient_target(x_s, noise, zero, t), noise - x_s)
    torch.testing.assert_close(add_subinterval_noise(x_s, noise, zero, t), add_noise(x_s, noise, t))


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.5, 0.75), (0.9, 0.95)])
def test_mean_target_is_the_velocity_of_the_law(s: float, t: float) -> None:
    points, weights = hermite_grid(24, 3)
    count = len(points)
    x_s = add_noise(STUDENT.sample(points[:, :1]), points[:, 1:2], full(s, count))
    noise = points[:, 2:]
    x_t = add_subinterval_noise(x_s, noise, full(s, count), full(t, count))
    residual = ambient_target(x_s, noise, full(s, count), full(t, count)) - STUDENT.velocity(x_t, t)
    for power in range(3):
        assert float((weights[:, None] * residual * x_t**power).sum()) == pytest.approx(0.0, abs=1e-10)


def test_fake_score_loss_weight_and_gradient() -> None:
    x_s = torch.tensor([[0.3], [-2.0]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[1.1], [0.4]], dtype=torch.float64)
    s, t = full(0.0, 2), torch.tensor([0.2, 0.8], dtype=torch.float64)
    velocity = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    loss = ambient_fake_score_loss(velocity, x_s, noise, s, t)
    loss.backward()
    # min(1, 10 t^2): 0.4 and 1.
    assert loss.item() == pytest.approx((0.4 * 0.8**2 + 2.4**2) / 2)
    assert x_s.grad is None
    assert velocity.grad is not None
    assert velocity.grad.flatten().tolist() == pytest.approx([-0.4 * 0.8, -2.4])
    high = torch.full((2,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(
        ambient_fake_score_loss(velocity, x_s, noise, s, high), fake_score_loss(velocity, x_s, noise)
    )


def test_matching_at_s_zero_is_dmd_and_the_gain_is_the_benchs() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps, noise = (torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    x0.requires_grad_()
    t, zero = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64), full(0.0, 4)
    x_t = add_noise(x0.detach(), eps, t)
    fake, real = STUDENT.velocity(x_t, t[:, None]), TEACHER.velocity(x_t, t[:, None])
    loss = subinterval_matching_loss(x0, x_t, fake, real, (zero, t), eta=0.9, noise=noise)
    plain = distribution_matching_loss(x0, x_t - t[:, None] * fake, x_t - t[:, None] * real)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, x0), torch.autograd.grad(plain, x0))
    s = t / 2
    moved = [cps_transition(x_t, v, t, s, eta=0.9).draw(noise) for v in (fake, real)]
    gain = transition_gain(s, t, cosine=math.cos(0.45 * math.pi))
    torch.testing.assert_close(moved[0] - moved[1], gain[:, None] * (fake - real))
    expected = [transition_coefficient(float(a), float(b), eta=0.9) for a, b in zip(t, s, strict=True)]
    assert gain.tolist() == pytest.approx(expected)
    assert float(gain.max()) < 0


def test_a_student_step_above_zero_comes_to_rest_at_the_teacher() -> None:
    # x_s = (1 - s) (mu + tau z) + s eps with a student of its own (mu, tau), exact fake score, t on a grid.
    s, rows = 0.5, 32
    points, _ = hermite_grid(8, 3)
    points = points[(points.abs() < 3.2).all(dim=1)]
    z, eps, noise = (points[:, i].expand(rows, -1) for i in range(3))
    times = (torch.full((rows,), s, dtype=torch.float64), torch.linspace(0.52, 0.98, rows, dtype=torch.float64))
    for law, zero in ((TEACHER, True), (Gaussian(1.0, 1.3), False)):
        mean = torch.tensor(law.mean, dtype=torch.float64, requires_grad=True)
        x_s = add_noise(Gaussian(mean, law.std).sample(z), eps, times[0])
        x_t = add_subinterval_noise(x_s.detach(), noise, *times)
        t = times[1][:, None]
        loss = subinterval_matching_loss(
            x_s, x_t, law.velocity(x_t, t), TEACHER.velocity(x_t, t), times, eta=0.9, noise=noise
        )
        (gradient,) = torch.autograd.grad(loss, mean)
        if zero:
            assert float(gradient) == 0.0
        else:
            # The student lies above, descent lowers it.
            assert float(gradient) > 0.01


@given(st.floats(0.0, 0.999), st.floats(0.0, 0.99))
def test_times_stay_above_the_start(u: float, s: float) -> None:
    t = float(sample_subinterval_times(full(u), full(s)))
    assert s < t < 1.0
    if s < 0.9:
        assert 0.02 <= t <= 0.98


def regulariser_value(cosine: float, t: float, s: float) -> float:
    points, weights = hermite_grid(12, 3)
    count = len(points)
    spread = math.sqrt(STUDENT.variance(t))
    x_t = (1 - t) * STUDENT.mean + spread * points[:, :1]
    x0, eps = STUDENT.x0(x_t, t), eps_from_velocity(x_t, STUDENT.velocity(x_t, t), full(t, count))
    sine = math.sqrt(1 - cosine**2)
    moves = [add_noise(x0, cosine * eps + sine * points[:, i : i + 1], full(s, count)) for i in (1, 2)]
    first, second = (STUDENT.x0(x, s) for x in moves)
    root = (weights * count).sqrt()[:, None]
    return float(consistency_regulariser(root * x0, root * first, root * second))


def test_regulariser_is_the_squared_martingale_residual() -> None:
    t, s = 0.8, 0.7
    cosine = math.cos(0.45 * math.pi)
    assert regulariser_value(cosine, t, s) == pytest.approx(martingale_residual(STUDENT, t, s, cosine=cosine) ** 2)
    assert regulariser_value(matched_cosine(t, s), t, s) == pytest.approx(0.0, abs=1e-14)


def test_martingale_noise_has_the_matched_cosine_and_unit_variance() -> None:
    eps, noise = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mixed = martingale_noise(eps, noise, full(0.8, 2), full(0.7, 2)).flatten()
    assert float(mixed[0]) == pytest.approx(matched_cosine(0.8, 0.7))
    assert float(mixed.square().sum()) == pytest.approx(1.0)
    x0 = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    moved = reverse_move(x0, eps, noise, full(0.8, 2), full(0.7, 2))
    assert not moved.requires_grad
    torch.testing.assert_close(moved.flatten(), 0.7 * mixed)


def test_regulariser_gradients_reach_all_three() -> None:
    anchor, first, second = (torch.full((2,), value, requires_grad=True) for value in (1.0, 3.0, 0.0))
    loss = consistency_regulariser(anchor, first, second)
    loss.backward()
    assert loss.item() == -2.0
    assert [float(x.grad[0]) for x in (anchor, first, second) if x.grad is not None] == [-0.5, -0.5, 1.0]


def test_wrong_times() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="0 <= s < t < 1"):
        add_subinterval_noise(x, x, torch.tensor([0.5]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="offset"):
        sample_subinterval_times(torch.tensor([0.5]), torch.tensor([1.0]))
