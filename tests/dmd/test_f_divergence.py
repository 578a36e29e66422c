"""f-divergence weights against f''(r) r^2 and against gradients of the divergences themselves; clamps; time bins."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.dmd.f_divergence import (
    Divergence,
    bin_of_time,
    density_ratio,
    divergence_weight,
    normalise_by_time,
    saturated_share,
    unit_mean,
)
from fewstep.dmd.loss import direction_normaliser, distribution_matching_loss
from tests.dmd.gaussian_bench import (
    Gaussian,
    forward_kl_mean_gradient,
    hermite_grid,
    log_ratio,
    mean_gradient,
    reverse_kl_gradients,
)

# Generators f with D_f = E_student f(p_teacher / p_student), scaled so that f''(r) r^2 is the weight itself.
GENERATORS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_rkl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "neyman": lambda r: (r - 1).square() / (2 * r),
    "squared_hellinger": lambda r: 2 * (r.sqrt() - 1).square(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}
STUDENT, TEACHER = Gaussian(0.2, 1.1), Gaussian(0.7, 1.3)


@pytest.mark.parametrize("divergence", get_args(Divergence))
def test_weight_is_the_second_derivative(divergence: Divergence) -> None:
    r = torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(divergence_weight(r, divergence), second * r.detach() ** 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divergence", get_args(Divergence))
@pytest.mark.parametrize("t", [0.4, 0.7])
def test_weighted_direction_is_the_gradient_of_the_divergence(divergence: Divergence, t: float) -> None:
    """f-distill, Theorem 1: E_q[h(r) a (s_fake - s_real)] against autograd through the integral of q f(p / q)."""
    x = torch.linspace(-14, 14, 40001, dtype=torch.float64)
    mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    student = Gaussian(mean, 1.1)
    density = student.log_density(x, t).exp()
    ratio = log_ratio(student, TEACHER, x, t).exp()
    (slope,) = torch.autograd.grad(torch.trapezoid(density * GENERATORS[divergence](ratio), x), mean)
    weight = divergence_weight(ratio, divergence)
    direction = (1 - t) * (STUDENT.score(x, t) - TEACHER.score(x, t))
    expected = torch.trapezoid(density.detach() * weight * direction, x)
    assert float(expected) == pytest.approx(float(slope), rel=1e-5)
    assert float(slope) < 0


@pytest.mark.parametrize("t", [0.4, 0.8])
def test_loss_with_the_exact_ratio(t: float) -> None:
    """G9 as the logit: the loss's gradient is t^2 / a^2 times that of the forward KL (G10) or the reverse KL (G5)."""
    points, masses = hermite_grid(60, 2)
    mean = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    x0 = (mean + 1.1 * points[:, 0])[:, None]
    x_t = (1 - t) * x0.detach() + t * points[:, 1:]
    real, fake = TEACHER.x0(x_t, t), STUDENT.x0(x_t, t)
    ratio = density_ratio(log_ratio(STUDENT, TEACHER, x_t, t), max_log_ratio=100.0, lowest=1e-30, highest=1e30)
    factor = t**2 / (1 - t) ** 2
    forms: dict[Divergence, float] = {
        "kl": factor * float(forward_kl_mean_gradient(STUDENT, TEACHER, t)),
        "rkl": factor * float(reverse_kl_gradients(STUDENT, TEACHER, t)[0]),
    }
    assert forms["rkl"] == pytest.approx(float(mean_gradient(STUDENT, TEACHER, t)), rel=1e-12)
    for divergence, form in forms.items():
        weight = divergence_weight(ratio, divergence) * masses * len(masses) * direction_normaliser(x0, real)
        (slope,) = torch.autograd.grad(distribution_matching_loss(x0, fake, real, weight=weight), mean)
        assert float(slope) == pytest.approx(form, rel=1e-6)


def test_reverse_kl_changes_no_bit_of_the_gradient() -> None:
    x0, fake, real = torch.randn(3, 4, 7)
    x0.requires_grad_()
    weight = unit_mean(divergence_weight(density_ratio(torch.randn(4)), "rkl"))
    plain = torch.autograd.grad(distribution_matching_loss(x0, fake, real), x0)[0]
    weighted = torch.autograd.grad(distribution_matching_loss(x0, fake, real, weight=weight), x0)[0]
    assert torch.equal(plain, weighted)


@settings(max_examples=30, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50), min_size=1, max_size=8), divergence=st.sampled_from(list(get_args(Divergence)))
)
def test_weights_are_positive_bounded_and_of_mean_one(logits: list[float], divergence: Divergence) -> None:
    ratio = density_ratio(torch.tensor(logits, dtype=torch.float64))
    assert float(ratio.min()) >= 0.1
    assert float(ratio.max()) <= 20.0
    weight = unit_mean(divergence_weight(ratio, divergence))
    assert float(weight.min()) > 0
    assert float(weight.mean()) == pytest.approx(1.0, rel=1e-12)


def test_ratio_reads_real_as_large_and_averages_heads() -> None:
    logits = torch.tensor([[1.0, 3.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    ratio = density_ratio(logits)
    assert ratio.tolist() == pytest.approx([math.exp(2), math.exp(-1)])
    assert not ratio.requires_grad
    far = torch.tensor([-100.0, -1.0, 2.0, 100.0])
    assert density_ratio(far).tolist() == pytest.approx([0.1, math.exp(-1), math.exp(2), 20.0])
    assert float(saturated_share(far)) == 0.5
    wide = density_ratio(far, lowest=1e-9, highest=1e9)
    assert wide[[0, 3]].tolist() == pytest.approx([math.exp(-10), math.exp(10)], rel=1e-5)
    assert math.isnan(float(density_ratio(torch.tensor([math.nan]))))
    with pytest.raises(ValueError, match="0 < lowest < highest"):
        density_ratio(far, lowest=2.0, highest=1.0)


def test_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="'tv' is unknown"):
        divergence_weight(torch.ones(2), "tv")  # pyright: ignore[reportArgumentType]


def test_mean_over_processes_can_be_given() -> None:
    weight = torch.tensor([1.0, 3.0])
    assert unit_mean(weight).tolist() == [0.5, 1.5]
    assert unit_mean(weight, mean=torch.tensor(4.0)).tolist() == [0.25, 0.75]


def test_time_bins_average_within_a_bin() -> None:
    t = torch.tensor([0.1, 0.2, 0.6, 1.0])
    assert bin_of_time(t, bins=4, interval=(0.0, 1.0)).tolist() == [0, 0, 2, 3]
    assert bin_of_time(torch.tensor([0.0, 0.95]), bins=2, interval=(0.1, 0.9)).tolist() == [0, 1]
    ratio = torch.tensor([3.0, 5.0, 0.5, 9.0])
    assert normalise_by_time(ratio, t, bins=4, interval=(0.0, 1.0)).tolist() == [0.75, 1.25, 1.0, 1.0]
    assert normalise_by_time(ratio, t, bins=1, interval=(0.0, 1.0)).mean().item() == pytest.approx(1.0)


def test_time_bins_of_two_processes_are_those_of_one() -> None:
    t, ratio = torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([3.0, 5.0, 1.0, 9.0])
    whole = normalise_by_time(ratio, t, bins=2, interval=(0.0, 1.0))
    seen: list[torch.Tensor] = []

    def keep(sums: torch.Tensor) -> torch.Tensor:
        seen.append(sums)
        return sums

    for rows in (slice(0, 1), slice(1, 4)):
        normalise_by_time(ratio[rows], t[rows], bins=2, interval=(0.0, 1.0), mean_over_processes=keep)
    mean = (seen[0] + seen[1]) / 2
    parts = [
        normalise_by_time(ratio[rows], t[rows], bins=2, interval=(0.0, 1.0), mean_over_processes=lambda sums: mean)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_time_bins_remove_a_bias_that_depends_on_time() -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(4000, generator=generator, dtype=torch.float64)
    truth = torch.rand(4000, generator=generator, dtype=torch.float64) + 0.5
    biased = truth * (1 + 4 * bin_of_time(t, bins=10, interval=(0.0, 1.0)))
    corrected = normalise_by_time(biased, t, bins=10, interval=(0.0, 1.0))
    assert float((corrected / truth - 1).abs().max()) < 0.06


def test_time_bins_refuse_bad_settings() -> None:
    with pytest.raises(ValueError, match="bins 0 of the interval"):
        normalise_by_time(torch.ones(1), torch.ones(1), bins=0, interval=(0.0, 1.0))
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        normalise_by_time(torch.ones(1), torch.ones(1), bins=2, interval=(0.5, 0.5))
