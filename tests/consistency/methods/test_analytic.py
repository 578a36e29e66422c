"""The closed forms that the other tests lean on: golden values, identities, and the mixture against quadrature."""

import math

import pytest
import torch
from studies.toy_mixture import Mixture

from tests.consistency.analytic import BIMODAL, Gaussian, fp64

GAUSSIAN = Gaussian()
ONE = Mixture((1.0,), (0.7,), (1.6,))


def test_golden_values_in_rectified_flow() -> None:
    x, t, r = fp64(0.4), fp64(0.73), fp64(0.21)
    assert GAUSSIAN.velocity(x, t).item() == pytest.approx(-0.68862192, abs=1e-8)
    assert GAUSSIAN.score(x, t).item() == pytest.approx(-0.29324943, abs=1e-8)
    assert GAUSSIAN.x0(x, t).item() == pytest.approx(0.90269400, abs=1e-8)
    assert GAUSSIAN.flow_map(x, t, r).item() == pytest.approx(0.87172741, abs=1e-8)
    assert GAUSSIAN.average_velocity(x, t, r).item() == pytest.approx(-0.90716809, abs=1e-8)
    assert GAUSSIAN.consistency(x, t).item() == pytest.approx(1.09799700, abs=1e-8)


def test_golden_values_in_trigflow() -> None:
    gaussian, x, tau = Gaussian(0.3, 0.8, 0.5), fp64(0.35), fp64(1.1)
    assert 0.5 * gaussian.trig(x, tau).item() == pytest.approx(-0.36948761, abs=1e-8)
    assert gaussian.trig_consistency(x, tau).item() == pytest.approx(0.59780186, abs=1e-8)
    assert gaussian.trig_student(x, tau).item() == pytest.approx(-0.98527735, abs=1e-8)


def test_student_is_not_zero_where_the_teacher_is() -> None:
    gaussian = Gaussian(0.0, 0.5, 0.5)
    x, tau = fp64(0.35, -1.2, 0.8), fp64(0.3, 1.1, math.pi / 2)
    assert gaussian.trig(x, tau).abs().max().item() < 1e-15
    torch.testing.assert_close(gaussian.trig_consistency(x, tau), x, rtol=1e-12, atol=0)
    torch.testing.assert_close(gaussian.trig_student(x, tau), -torch.tan(tau / 2) * x / 0.5, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [GAUSSIAN, BIMODAL], ids=["gaussian", "mixture"])
def test_identities_of_average_velocity_and_flow(teacher: Gaussian | Mixture) -> None:
    x, t, r = fp64(0.4, -0.9, 1.7), fp64(0.73, 0.5, 0.95), fp64(0.21, 0.1, 0.6)
    v, u = teacher.velocity(x, t), teacher.average_velocity(x, t, r)
    forward = torch.func.jvp(teacher.average_velocity, (x, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))[1]
    torch.testing.assert_close(u + (t - r) * forward, v, rtol=0, atol=1e-6)
    end = teacher.flow_map(x, t, r)
    backward = torch.func.jvp(lambda r: teacher.average_velocity(x, t, r), (r,), (torch.ones_like(r),))[1]
    torch.testing.assert_close((t - r) * backward, u - teacher.velocity(end, r), rtol=0, atol=1e-6)
    middle = 0.5 * (t + r)
    torch.testing.assert_close(teacher.flow_map(teacher.flow_map(x, t, middle), middle, r), end, rtol=0, atol=1e-7)
    torch.testing.assert_close(teacher.flow_map(x, t, t), x, rtol=0, atol=1e-14)
    tangent = torch.func.jvp(teacher.consistency, (x, t), (v, torch.ones_like(t)))[1]
    assert tangent.abs().max().item() < 1e-6


def test_average_velocity_tends_to_the_velocity() -> None:
    x, t = fp64(0.4, -0.9), fp64(0.73, 0.2)
    torch.testing.assert_close(GAUSSIAN.average_velocity(x, t, t), GAUSSIAN.velocity(x, t), rtol=1e-14, atol=0)
    assert torch.equal(BIMODAL.average_velocity(x, t, t), BIMODAL.velocity(x, t))


def test_mixture_of_one_is_the_gaussian() -> None:
    x, t, r = fp64(0.4, -2.0, 1.0), fp64(0.73, 1.0, 0.4), fp64(0.21, 0.0, 0.0)
    torch.testing.assert_close(ONE.velocity(x, t), GAUSSIAN.velocity(x, t), rtol=1e-13, atol=0)
    torch.testing.assert_close(ONE.flow_map(x, t, r), GAUSSIAN.flow_map(x, t, r), rtol=0, atol=1e-8)
    torch.testing.assert_close(ONE.x0(x, t), GAUSSIAN.x0(x, t), rtol=1e-12, atol=1e-13)
    assert ONE.std == pytest.approx(1.6)


def test_mixture_denoiser_is_the_posterior_mean() -> None:
    x, t = 0.3, 0.6
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    parts = zip(BIMODAL.weights, BIMODAL.means, BIMODAL.stds, strict=True)
    prior = sum(w / s * torch.exp(-((grid - m) ** 2) / (2 * s * s)) for w, m, s in parts)
    posterior = prior * torch.exp(-((x - (1 - t) * grid) ** 2) / (2 * t * t))
    expected = float((grid * posterior).sum() / posterior.sum())
    assert BIMODAL.x0(fp64(x), fp64(t)).item() == pytest.approx(expected, abs=1e-9)


def test_mixture_flow_keeps_quantiles() -> None:
    # In one dimension the flow is monotone, so it carries each quantile of the noise to that of the data.
    quantile = fp64(0.1, 0.35, 0.5, 0.9)
    noise = torch.special.ndtri(quantile)
    x0 = BIMODAL.consistency(noise, torch.ones_like(noise))
    parts = zip(BIMODAL.weights, BIMODAL.means, BIMODAL.stds, strict=True)
    reached = sum(w * torch.special.ndtr((x0 - m) / s) for w, m, s in parts)
    torch.testing.assert_close(reached, quantile, rtol=0, atol=1e-7)


def test_mixture_samples_have_its_moments() -> None:
    n = 200_000
    data = BIMODAL.sample(torch.rand(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64))
    assert data.mean().item() == pytest.approx(0.4 * -1.2 + 0.6 * 0.9, abs=0.01)
    assert data.std().item() == pytest.approx(BIMODAL.std, abs=0.01)


def test_broken_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture((0.5, 0.4), (0.0, 1.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="must be positive"):
        Mixture((0.5, 0.5), (0.0, 1.0), (1.0, 0.0))
