"""SiD: values and gradients in closed form for Gaussians, and the graph that must not be cut."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.dmd.loss import direction_normaliser
from fewstep.dmd.sid_loss import sid_loss
from tests.dmd.gaussian_bench import Gaussian, hermite_grid

TEACHER = Gaussian(0.7, 1.3)
TIMES = (0.02, 0.4, 0.98)


def quadrature_loss(mean: Tensor, std: Tensor, fake: Gaussian, t: float, alpha: float, cut: bool = False) -> Tensor:
    """Exact E[loss normaliser] for the student mean + std z against a frozen fake score."""
    points, masses = hermite_grid(12, 2)
    x0 = (mean + std * points[:, 0])[:, None]
    x_t = (1 - t) * (x0.detach() if cut else x0) + t * points[:, 1:]
    real = TEACHER.x0(x_t, t)
    weight = masses * len(masses) * direction_normaliser(x0, real)
    return sid_loss(x0, fake.x0(x_t, t), real, alpha=alpha, weight=weight)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_value_for_an_exact_fake_score(t: float, alpha: float) -> None:
    """(1 - alpha) E|b - a|^2, from the projection identity G11."""
    points, masses = hermite_grid(12, 2)
    x_t = (1 - t) * (-0.4 + 0.6 * points[:, 0]) + t * points[:, 1]
    fake = Gaussian(-0.4, 0.6)
    distance = (masses * (TEACHER.x0(x_t, t) - fake.x0(x_t, t)) ** 2).sum()
    value = quadrature_loss(scalar(-0.4), scalar(0.6), fake, t, alpha)
    assert value.item() == pytest.approx((1 - alpha) * float(distance), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_of_the_mean_for_equal_variance(t: float, alpha: float) -> None:
    """(mu - m) (t^2 / V)^2 for every alpha: descent moves the mean to the teacher's."""
    mean, std = scalar(-0.4), scalar(1.3)
    (slope,) = torch.autograd.grad(quadrature_loss(mean, std, Gaussian(-0.4, 1.3), t, alpha), mean)
    assert float(slope) == pytest.approx((-0.4 - 0.7) * (t**2 / float(TEACHER.variance(t))) ** 2, rel=1e-9)
    assert float(slope) < 0


@pytest.mark.parametrize("t", TIMES)
def test_equal_student_has_no_gradient(t: float) -> None:
    mean, std = scalar(0.7), scalar(1.3)
    slopes = torch.autograd.grad(quadrature_loss(mean, std, TEACHER, t, 1.2), (mean, std))
    assert [float(slope) for slope in slopes] == [0.0, 0.0]


def test_gradient_through_x_t_matters() -> None:
    """With x_t cut the mean's gradient is (mu - m) t^2 / V: another method, whatever alpha."""
    t = 0.4
    mean, std = scalar(-0.4), scalar(1.3)
    fake = Gaussian(-0.4, 1.3)
    (slope,) = torch.autograd.grad(quadrature_loss(mean, std, fake, t, 1.2, cut=True), mean)
    assert float(slope) == pytest.approx((-0.4 - 0.7) * t**2 / float(TEACHER.variance(t)), rel=1e-9)


def test_gradients_reach_all_three_inputs_but_not_the_normaliser() -> None:
    x0, fake, real = (part.clone().requires_grad_() for part in torch.randn(3, 2, 5, dtype=torch.float64))
    loss = sid_loss(x0, fake, real, alpha=1.2)
    slopes = torch.autograd.grad(loss, (x0, fake, real))
    scale = (x0 - real).abs().mean(dim=1, keepdim=True).detach() * x0.numel()
    difference = (real - fake).detach()
    rest = (real - x0).detach() - 1.2 * difference
    torch.testing.assert_close(slopes[0], -difference / scale)
    torch.testing.assert_close(slopes[1], (-rest + 1.2 * difference) / scale)
    torch.testing.assert_close(slopes[2], (rest - 0.2 * difference) / scale)
    assert loss.item() == pytest.approx(float((difference * rest / scale).sum()), rel=1e-12)


def test_floor_half_precision_and_non_finite() -> None:
    x0 = torch.randn(2, 4, requires_grad=True)
    same = x0.detach()
    loss = sid_loss(x0, same, same)
    assert loss.item() == 0.0
    assert float(torch.autograd.grad(loss, x0)[0].abs().max()) == 0.0
    half = torch.ones(2, 4, dtype=torch.bfloat16)
    assert sid_loss(half, 2 * half, 3 * half).dtype == torch.float32
    bad = same.clone()
    bad[0, 0] = math.nan
    assert math.isnan(sid_loss(x0, bad, same).item())
    assert math.isnan(sid_loss(x0, same, bad).item())
    with pytest.raises(ValueError, match="one shape"):
        sid_loss(x0, same[:1], same)
