"""TrigFlow against rectified flow, VP and EDM: exact conversions, golden numbers, finite ends, and forward mode."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.consistency.trigflow import (
    add_trig_noise,
    angle_from_time,
    eps_from_trig,
    from_trig_state,
    path_to_trig_state,
    state_scale,
    time_from_angle,
    to_trig_state,
    trig_from_velocity,
    trig_function,
    trig_target,
    trig_to_path_state,
    velocity_from_trig,
    x0_from_trig,
)
from fewstep.core.grids import shift_time
from fewstep.core.paths import (
    EDM,
    NoisePath,
    RectifiedFlow,
    TrigFlow,
    VariancePreserving,
    add_noise,
    path_add_noise,
)
from tests.consistency.analytic import BIMODAL, Gaussian, fp64

VP = VariancePreserving.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SCALES = st.floats(0.2, 3.0)


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(1.3 * x) * t + 0.4 * x - 0.2 * t.square()


@pytest.mark.parametrize(
    ("tau", "t"),
    [
        (1.5, 0.93378),
        (1.4, 0.85290),
        (1.3, 0.78271),
        (1.0, 0.60898),
        (0.6, 0.40622),
        (math.atan(80), 80 / 81),
        (math.atan(200), 0.99502),
        (math.atan(400), 0.99751),
        (math.atan(1600), 0.99938),
        (math.pi / 2, 1.0),
        (0.0, 0.0),
    ],
)
def test_times_of_the_literature(tau: float, t: float) -> None:
    assert time_from_angle(fp64(tau)).item() == pytest.approx(t, abs=6e-6)
    assert angle_from_time(time_from_angle(fp64(tau))).item() == pytest.approx(tau, abs=1e-12)


def test_ends_are_exact_in_fp32() -> None:
    ends = torch.tensor([0.0, 1.0])
    tau = angle_from_time(ends)
    assert tau.tolist() == [0.0, torch.tensor(math.pi / 2).item()]
    assert time_from_angle(tau).tolist() == [0.0, 1.0]
    x = torch.tensor([0.3, -0.7])
    assert bool(trig_function(nonlinear)(x, tau).isfinite().all())
    assert x0_from_trig(x, trig_function(nonlinear)(x, tau), tau)[0].item() == x[0].item()


def test_shifts_of_the_literature() -> None:
    times = fp64(0.75, 0.5, 0.25)
    torch.testing.assert_close(shift_time(times, 5.0), fp64(15 / 16, 5 / 6, 5 / 8))
    torch.testing.assert_close(shift_time(times, 3.0), fp64(0.9, 0.75, 0.5))


@given(t=st.floats(0, 1), sigma_data=SCALES)
def test_time_round_trip(t: float, sigma_data: float) -> None:
    tau = angle_from_time(fp64(t), sigma_data)
    assert 0 <= tau.item() <= math.pi / 2
    assert time_from_angle(tau, sigma_data).item() == pytest.approx(t, abs=1e-13)


@given(t=st.floats(0, 1), sigma_data=SCALES, x=st.floats(-5, 5), v=st.floats(-5, 5))
def test_network_and_state_round_trip(t: float, sigma_data: float, x: float, v: float) -> None:
    state, velocity, time = fp64(x), fp64(v), fp64(t)
    x_tau, tau = to_trig_state(state, time, sigma_data)
    back, time_back = from_trig_state(x_tau, tau, sigma_data)
    assert back.item() == pytest.approx(x, abs=1e-12)
    assert time_back.item() == pytest.approx(t, abs=1e-12)
    trig = trig_from_velocity(state, velocity, tau, sigma_data)
    assert velocity_from_trig(state, trig, tau, sigma_data).item() == pytest.approx(v, abs=1e-11)
    # x0 is one number in both coordinates: the network that is wrapped predicts the same data.
    assert x0_from_trig(x_tau, trig, tau, sigma_data).item() == pytest.approx(x - t * v, abs=1e-11)
    assert eps_from_trig(x_tau, trig, tau, sigma_data).item() == pytest.approx(x + (1 - t) * v, abs=1e-11)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_one_pair_of_data_and_noise(sigma_data: float) -> None:
    x0, eps = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    tau = fp64(0.0, 0.3, 0.9, 1.4, math.pi / 2)
    x_tau = add_trig_noise(x0, eps, tau, sigma_data)
    time = time_from_angle(tau, sigma_data)
    expected, angles = to_trig_state(add_noise(x0, eps, time), time, sigma_data)
    torch.testing.assert_close(x_tau, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(angles, tau, rtol=0, atol=1e-12)
    target = trig_target(x0, eps, tau, sigma_data)
    torch.testing.assert_close(x0_from_trig(x_tau, target, tau, sigma_data), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(eps_from_trig(x_tau, target, tau, sigma_data), eps, rtol=0, atol=1e-12)
    x_t, t = from_trig_state(x_tau, tau, sigma_data)
    torch.testing.assert_close(x_t, add_noise(x0, eps, t), rtol=0, atol=1e-12)
    torch.testing.assert_close(target, trig_from_velocity(x_t, eps - x0, tau, sigma_data), rtol=0, atol=1e-12)


def test_forms_of_rcm_and_sana() -> None:
    x_tau, v = torch.randn(2, 4, dtype=torch.float64)
    tau = fp64(0.2, 0.8, 1.3, 1.55)
    cos, sin = torch.cos(tau), torch.sin(tau)
    x_t, t = from_trig_state(x_tau, tau)
    trig = trig_from_velocity(x_t, v, tau)
    # rCM: c_skip = b, c_out = -S / Z, and F = (C x - x0) / S.
    b = 1 / (cos + sin)
    torch.testing.assert_close(trig, (cos * x_tau - (b * x_tau - sin * b * v)) / sin, rtol=1e-12, atol=1e-12)
    # SANA-Sprint: ((1 - 2t) x + (1 - 2t + 2t^2) v) / sqrt(t^2 + (1 - t)^2), b being that root.
    root = (t.square() + (1 - t).square()).sqrt()
    sana = ((1 - 2 * t) * x_t + (1 - 2 * t + 2 * t.square()) * v) / root
    torch.testing.assert_close(trig, sana, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(1 / state_scale(tau), root, rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5, 1.6])
@pytest.mark.parametrize(
    ("path", "time"),
    [
        (RectifiedFlow(), fp64(0.05, 0.4, 0.99)),
        (VP, fp64(3.0, 500.0, 998.0)),
        (EDM(), fp64(0.002, 0.8, 80.0)),
        (TrigFlow(), fp64(0.1, 0.9, 1.5)),
    ],
    ids=["flow", "vp", "edm", "trig"],
)
def test_teachers_of_every_path(path: NoisePath, time: Tensor, sigma_data: float) -> None:
    gaussian = Gaussian(0.7, 1.6, sigma_data)
    x0, eps = torch.randn(2, 3, dtype=torch.float64)
    x = path_add_noise(path, x0, eps, time)
    x_tau, tau = path_to_trig_state(path, x, time, sigma_data)
    # The derivation for any path: tan(tau) = sigma / (sd alpha), x_tau = sd x / sqrt(alpha^2 sd^2 + sigma^2).
    alpha, sigma = path.alpha(time), path.sigma(time)
    torch.testing.assert_close(tau, torch.atan(sigma / (sigma_data * alpha)), rtol=0, atol=1e-10)
    norm = ((alpha * sigma_data).square() + sigma.square()).sqrt()
    torch.testing.assert_close(x_tau, sigma_data * x / norm, rtol=0, atol=1e-10)
    # A teacher in its own coordinates gives x0; F through it equals the closed form of TrigFlow.
    x0_hat = 0.7 + alpha * 1.6**2 / ((alpha * 1.6).square() + sigma.square()) * (x - alpha * 0.7)
    trig = gaussian.trig(x_tau, tau)
    torch.testing.assert_close(x0_from_trig(x_tau, trig, tau, sigma_data), x0_hat, rtol=0, atol=1e-10)
    back, time_back = trig_to_path_state(path, x_tau, tau, sigma_data)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(time_back, time, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_wrapped_teacher_and_consistency_function(sigma_data: float) -> None:
    gaussian = Gaussian(0.7, 1.6, sigma_data)
    x_tau, tau = fp64(0.83, -1.1, 2.0), fp64(0.3, 0.9, 1.4)
    wrapped = trig_function(gaussian.velocity, sigma_data)(x_tau, tau)
    torch.testing.assert_close(wrapped, gaussian.trig(x_tau, tau), rtol=0, atol=1e-12)
    x_t, t = from_trig_state(x_tau, tau, sigma_data)
    torch.testing.assert_close(gaussian.trig_consistency(x_tau, tau), gaussian.consistency(x_t, t), rtol=0, atol=1e-12)
    student = trig_function(gaussian.flow_student, sigma_data)(x_tau, tau)
    torch.testing.assert_close(student, gaussian.trig_student(x_tau, tau), rtol=0, atol=1e-12)


def test_velocity_of_the_wrapped_mixture_moves_the_state() -> None:
    x_tau, tau, h = fp64(0.4), fp64(0.9), 1e-5
    x_t, t = from_trig_state(x_tau, tau)
    after, before = time_from_angle(tau + h), time_from_angle(tau - h)
    ahead = to_trig_state(BIMODAL.flow_map(x_t, t, after, steps=4), after)[0]
    behind = to_trig_state(BIMODAL.flow_map(x_t, t, before, steps=4), before)[0]
    velocity = trig_function(BIMODAL.velocity)(x_tau, tau)
    torch.testing.assert_close(velocity, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


def test_forward_mode_passes_through_the_wrapper() -> None:
    function = trig_function(nonlinear, 0.5)
    x, tau, dx, h = torch.randn(3, 2, 2, dtype=torch.float64), fp64(0.3, 0.9, 1.4), torch.randn(3, 2, 2).double(), 1e-6
    dtau = torch.ones_like(tau)

    def per_sample(x: Tensor, tau: Tensor) -> Tensor:
        return trig_function(lambda y, t: nonlinear(y, t.view(-1, 1, 1)), 0.5)(x, tau)

    tangent = torch.func.jvp(per_sample, (x, tau), (dx, dtau))[1]
    difference = (per_sample(x + h * dx, tau + h) - per_sample(x - h * dx, tau - h)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-7, atol=1e-8)
    assert function(x[:, 0, 0], tau).dtype == torch.float64


def test_scale_must_be_positive() -> None:
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="sigma_data must be positive"):
            trig_function(nonlinear, bad)
        with pytest.raises(ValueError, match="sigma_data must be positive"):
            angle_from_time(fp64(0.5), bad)
