"""Tangents in both coordinates, their chain rule, normalisers, and the loss with its isolated samples."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from studies.toy_mixture import Mixture
from torch import Tensor, nn

from fewstep.consistency.batch import Noised
from fewstep.consistency.methods.scm import (
    Tangent,
    flow_tangent,
    normalise_tangent,
    path_derivative,
    scm_loss,
    tangent_warmup,
    trig_tangent,
)
from fewstep.consistency.sample_loss import reduce_sample
from fewstep.consistency.sections import ContinuousConfig
from fewstep.consistency.tangents import total_derivative
from fewstep.consistency.trigflow import (
    VelocityFunction,
    angle_from_time,
    from_trig_state,
    state_scale,
    time_from_angle,
    trig_function,
)
from fewstep.core.condition import Condition
from tests.consistency.analytic import BIMODAL, Gaussian, fp64

GAUSSIAN = Gaussian()
SAMPLES = fp64(0.83, -1.4, 0.2, 2.1)
ANGLES = fp64(0.3, 0.9, 1.4, 1.5)


def nonlinear(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(1.3 * x) * t + 0.4 * x - 0.2 * t.square()


def trig_direction(
    student: VelocityFunction, teacher: VelocityFunction, x: Tensor, tau: Tensor, sd: float = 1.0, warmup: float = 1.0
) -> Tangent:
    """g of F functions of (x_tau, tau)."""
    scale = torch.cos(tau) * torch.sin(tau)
    trig_teacher = teacher(x, tau)
    value, derivative = total_derivative(student, x, tau, scale * sd * trig_teacher, scale)
    return trig_tangent(x, value, trig_teacher, derivative, tau, warmup=warmup, sigma_data=sd)


def flow_direction(student: VelocityFunction, teacher: VelocityFunction, x: Tensor, t: Tensor) -> Tangent:
    """g of velocity functions of (x_t, t)."""
    velocity = teacher(x, t)
    value, derivative = total_derivative(student, x, t, velocity, torch.ones_like(t))
    return flow_tangent(value, velocity, derivative, t)


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_exact_consistency_function_has_no_tangent(sd: float) -> None:
    gaussian = Gaussian(0.3, 0.8, sd)
    tangent = trig_direction(gaussian.trig_student, gaussian.trig, SAMPLES, ANGLES, sd=sd)
    assert tangent.total.abs().max().item() < 1e-8
    assert tangent.gap.abs().max().item() > 1e-3
    without = trig_direction(gaussian.trig_student, gaussian.trig, SAMPLES, ANGLES, sd=sd, warmup=0.0)
    gap = gaussian.trig_student(SAMPLES, ANGLES) - gaussian.trig(SAMPLES, ANGLES)
    torch.testing.assert_close(without.total, -torch.cos(ANGLES).square() * sd * gap, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [GAUSSIAN, BIMODAL], ids=["gaussian", "mixture"])
def test_exact_flow_student_has_no_tangent(teacher: Gaussian | Mixture) -> None:
    t = fp64(0.2, 0.5, 0.8, 1.0)

    def student(x: Tensor, t: Tensor) -> Tensor:
        return teacher.average_velocity(x, t, torch.zeros_like(t))

    tangent = flow_direction(student, teacher.velocity, SAMPLES, t)
    assert tangent.total.abs().max().item() < 1e-7
    assert tangent.gap.abs().max().item() > 0.1
    wrapped = trig_direction(trig_function(student), trig_function(teacher.velocity), SAMPLES, ANGLES)
    assert wrapped.total.abs().max().item() < 1e-7


def test_tangent_is_the_derivative_of_the_consistency_function() -> None:
    sd, h = 0.5, 1e-5
    gaussian = Gaussian(0.3, 0.8, sd)
    student = trig_function(nonlinear, sd)

    def consistency(x: Tensor, tau: Tensor) -> Tensor:
        return torch.cos(tau) * x - torch.sin(tau) * sd * student(x, tau)

    dx = sd * gaussian.trig(SAMPLES, ANGLES)
    difference = (consistency(SAMPLES + h * dx, ANGLES + h) - consistency(SAMPLES - h * dx, ANGLES - h)) / (2 * h)
    tangent = trig_direction(student, gaussian.trig, SAMPLES, ANGLES, sd=sd).total
    torch.testing.assert_close(tangent, torch.cos(ANGLES) * difference, rtol=1e-7, atol=1e-9)


def test_golden_tangents_of_a_nonlinear_student() -> None:
    x, tau = fp64(0.83, 0.83, 0.83), fp64(0.3, 0.9, 1.4)
    tangent = trig_direction(trig_function(nonlinear), trig_function(GAUSSIAN.velocity), x, tau).total
    assert tangent.tolist() == pytest.approx([-0.80255, -0.39733, -0.15961], abs=6e-6)


@pytest.mark.parametrize("sd", [0.5, 1.0, 1.6])
def test_chain_rule_between_the_coordinates(sd: float) -> None:
    x_t, t = from_trig_state(SAMPLES, ANGLES, sd)
    flow = flow_direction(nonlinear, BIMODAL.velocity, x_t, t).total
    trig = trig_direction(
        trig_function(nonlinear, sd), trig_function(BIMODAL.velocity, sd), SAMPLES, ANGLES, sd=sd
    ).total
    factor = torch.cos(ANGLES) * sd / state_scale(ANGLES, sd).square()
    torch.testing.assert_close(trig, factor * flow, rtol=1e-10, atol=1e-12)


def test_placements_of_the_warmup() -> None:
    x, network, teacher, derivative = torch.randn(4, 4, 3, dtype=torch.float64)
    cos, sin = torch.cos(ANGLES).view(4, 1), torch.sin(ANGLES).view(4, 1)

    def tangent(placement: str, warmup: float) -> Tensor:
        return trig_tangent(
            x,
            network,
            teacher,
            derivative,
            ANGLES,
            warmup=warmup,
            sigma_data=0.5,
            placement=placement,  # type: ignore[arg-type]
        ).total

    torch.testing.assert_close(tangent("state", 1.0), tangent("drift", 1.0), rtol=1e-12, atol=1e-14)
    gap = 0.5 * (network - teacher)
    half = -cos.square() * gap - 0.5 * (cos * sin * x + 0.5 * derivative)
    torch.testing.assert_close(tangent("drift", 0.5), half, rtol=1e-13, atol=1e-15)
    rcm = -cos * (1 - 0.25 * sin.square()).sqrt() * gap - 0.5 * cos * sin * x - 0.5 * derivative
    torch.testing.assert_close(tangent("state", 0.5), rcm, rtol=1e-13, atol=1e-15)
    assert float((rcm - half).abs().max()) > 0.01
    t = fp64(0.1, 0.4, 0.7, 1.0)
    flow = flow_tangent(network, teacher, derivative, t, warmup=0.3)
    expected = teacher - network - 0.3 * t.view(4, 1) * derivative
    torch.testing.assert_close(flow.total, expected, rtol=1e-13, atol=1e-15)


def test_warmup_factor() -> None:
    assert [tangent_warmup(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert tangent_warmup(0, 0) == 1.0
    with pytest.raises(ValueError, match="0 or more"):
        tangent_warmup(-1, 4)


@given(scale=st.floats(1e-3, 1e4), constant=st.floats(1e-3, 10))
def test_normalisers(scale: float, constant: float) -> None:
    g = scale * torch.linspace(-1, 2, 24, dtype=torch.float64).view(2, 3, 4)
    norm = torch.stack([sample.norm() for sample in g]).view(2, 1, 1)
    l2 = normalise_tangent(g, kind="l2", constant=constant)
    torch.testing.assert_close(l2, g / (norm + constant), rtol=1e-12, atol=0)
    assert l2.flatten(1).norm(dim=1).max().item() < 1
    rms = normalise_tangent(g, kind="rms", constant=constant)
    torch.testing.assert_close(rms, g / (norm / math.sqrt(12) + constant), rtol=1e-12, atol=0)
    assert rms.square().mean(dim=(1, 2)).max().item() < 1
    assert torch.equal(normalise_tangent(g, kind="clip"), g.clamp(-1, 1))
    assert torch.equal(normalise_tangent(g, kind="none"), g)


def test_normaliser_uses_the_unsquared_norm() -> None:
    g = fp64(3.0, 4.0).view(1, 2)
    assert normalise_tangent(g, constant=0.1).flatten().tolist() == pytest.approx([3 / 5.1, 4 / 5.1])


def test_normalised_random_velocity_is_biased_and_a_teacher_is_not() -> None:
    # E d = 0 for this skewed law, but E d / (|d| + c) is not: known of training without a teacher.
    d = fp64(-0.25, -0.25, -0.25, -0.25, 1.0).view(5, 1)
    assert d.mean().item() == 0.0
    assert normalise_tangent(d, constant=0.1).mean().item() == pytest.approx((1 / 1.1 - 4 * 0.25 / 0.35) / 5)


@pytest.mark.parametrize(("reduction", "size"), [("mean", 12), ("sum", 1)])
def test_value_and_gradient_of_the_loss(reduction: str, size: int) -> None:
    network, g = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    g = normalise_tangent(g)
    result = scm_loss(network.requires_grad_(), g, reduction=reduction)  # type: ignore[arg-type]
    expected = g.square().sum(dim=(1, 2)) / size
    torch.testing.assert_close(result.error, expected, rtol=1e-13, atol=0)
    assert result.loss.item() == pytest.approx(expected.mean().item(), rel=1e-12)
    gradient = torch.autograd.grad(result.loss, network)[0]
    torch.testing.assert_close(gradient, -2 * g / (5 * size), rtol=1e-13, atol=0)
    assert int(result.isolated_count) == 0


def test_descent_makes_a_consistency_function() -> None:
    x, t = torch.randn(64, dtype=torch.float64), torch.rand(64, dtype=torch.float64)
    before = flow_direction(nonlinear, GAUSSIAN.velocity, x, t).total
    network = nonlinear(x, t).requires_grad_()
    gradient = torch.autograd.grad(scm_loss(network, before, reduction="sum").loss, network)[0]
    # Without the derivative of the correction itself, a small step along -gradient changes v by a multiple of g, and
    # f = x - t v by minus that: f falls where df/dt > 0.
    assert float((gradient * before).sum()) < 0
    torch.testing.assert_close(-gradient * 64 / 2, before, rtol=1e-12, atol=1e-14)


def test_learned_weight() -> None:
    network, g = torch.randn(2, 3, 4, dtype=torch.float64)
    w = fp64(0.2, -1.0, 0.5).requires_grad_()
    result = scm_loss(network.requires_grad_(), g, log_weight=w)
    error = g.square().mean(dim=1)
    assert result.loss.item() == pytest.approx((w.exp() * error - w).mean().item(), rel=1e-12)
    by_network, by_weight = torch.autograd.grad(result.loss, (network, w))
    torch.testing.assert_close(by_weight, ((w.exp() * error - 1) / 3).detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_network, (-2 * w.exp().view(3, 1) * g / 12).detach(), rtol=1e-12, atol=1e-15)
    # The optimum of the weight: exp(w) = 1 / error.
    at_optimum = scm_loss(network, g, log_weight=-error.log())
    assert at_optimum.loss.item() == pytest.approx((1 + error.log()).mean().item(), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["network", "tangent"])
def test_broken_samples_are_isolated_and_counted(bad: float, place: str) -> None:
    network, g = torch.randn(2, 4, 3, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    broken = {"network": network.clone(), "tangent": g.clone()}
    broken[place][2, 1] = bad
    leaf, clean = broken["network"].requires_grad_(), network.clone().requires_grad_()
    result = scm_loss(leaf, broken["tangent"], log_weight=w)
    assert int(result.isolated_count) == 1
    assert result.isolated.tolist() == [False, False, True, False]
    assert result.error[2].item() == 0.0
    by_leaf, by_weight = torch.autograd.grad(result.loss, (leaf, w))
    by_clean = torch.autograd.grad(scm_loss(clean, g, log_weight=torch.zeros(4)).loss, clean)[0]
    keep = [0, 1, 3]
    assert torch.equal(by_leaf[keep], by_clean[keep])
    assert by_leaf[2].abs().max().item() == 0.0
    assert by_weight[2].item() == 0.0


def test_an_exploding_tangent_is_counted_not_hidden() -> None:
    g = fp64(1.0, math.inf, 2.0).view(3, 1)
    result = scm_loss(torch.zeros(3, 1, dtype=torch.float64), normalise_tangent(g))
    assert result.isolated.tolist() == [False, True, False]


def test_gradient_reaches_the_network_alone() -> None:
    network = nn.Linear(3, 3, dtype=torch.float64)
    teacher = nn.Linear(3, 3, dtype=torch.float64)
    x, tau = torch.randn(4, 3, dtype=torch.float64), ANGLES
    scale = torch.cos(tau) * torch.sin(tau)
    trig_teacher = teacher(x)
    derivative = network(scale.view(4, 1) * trig_teacher)
    g = trig_tangent(x, network(x), trig_teacher, derivative, tau).total
    assert not g.requires_grad
    scm_loss(network(x), normalise_tangent(g)).loss.backward()
    assert teacher.weight.grad is None
    assert network.weight.grad is not None
    exact = network.weight.grad.clone()
    torch.testing.assert_close(exact, -2 / 12 * normalise_tangent(g).T @ x, rtol=1e-12, atol=1e-14)
    # Without the stop at F the loss is |g|^2 and has no gradient: the guard that a missing detach would trip.
    network.weight.grad = None
    value = network(x)
    (value - value - g).square().mean().backward()
    assert network.weight.grad is not None
    assert float((network.weight.grad - exact).abs().max()) > 0.01


def test_small_tangents_survive_fp32_and_bf16_networks() -> None:
    network = torch.full((1, 8), 1000.0, requires_grad=True)
    g = torch.full((1, 8), 1e-6)
    gradient = torch.autograd.grad(scm_loss(network, g, reduction="sum").loss, network)[0]
    torch.testing.assert_close(gradient, torch.full((1, 8), -2e-6), rtol=1e-6, atol=0)
    half = torch.ones(1, 8, dtype=torch.bfloat16, requires_grad=True)
    assert scm_loss(half, g).loss.dtype == torch.float32


def test_largest_angle_is_finite_in_fp32() -> None:
    tau = torch.full((2,), math.pi / 2)
    x = torch.tensor([0.4, -1.3])
    student = trig_function(lambda x, t: torch.sin(x) * t)
    assert time_from_angle(tau).tolist() == [1.0, 1.0]
    scale = torch.cos(tau) * torch.sin(tau)
    teacher = trig_function(GAUSSIAN.velocity)(x, tau)
    value, derivative = total_derivative(student, x, tau, scale * teacher, scale)
    g = trig_tangent(x, value, teacher, derivative, tau).total
    # cos df/dtau vanishes with cos: nothing is learned at exactly pi/2 but the bound of the normaliser.
    assert g.abs().max().item() < 1e-6


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        trig_tangent(x, x, x, x[:1], torch.zeros(2))
    with pytest.raises(ValueError, match="choose drift or state"):
        trig_tangent(x, x, x, x, torch.zeros(2), placement="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        flow_tangent(x, x, x, torch.zeros(2), warmup=1.5)
    with pytest.raises(ValueError, match="choose none, l2, rms or clip"):
        normalise_tangent(x, kind="power")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more"):
        normalise_tangent(x, constant=-0.1)
    with pytest.raises(ValueError, match="choose mean or sum"):
        reduce_sample(x, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        scm_loss(x, x, log_weight=torch.zeros(3))


@pytest.mark.parametrize("coordinates", ["trigflow", "rf"])
def test_a_difference_along_the_path_steps_as_far_as_it_says(coordinates: Literal["trigflow", "rf"]) -> None:
    """In TrigFlow the factor cos sin stands outside it: at t = 0.995 the step would else be a two-hundredth."""
    t, step = fp64(0.02, 0.4, 0.995), 1e-3
    x0, eps = fp64(0.83, -1.4, 0.2)[:, None], fp64(-0.3, 0.6, 1.7)[:, None]
    noised = Noised(x0, eps, t, Condition(torch.zeros(3, 1, 1)), 0)
    seen: list[Tensor] = []

    class Student(nn.Module):
        def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            seen.append(time.detach().clone())
            return nonlinear(x, time[:, None])

    target = BIMODAL.velocity(noised.x_t[:, 0], t)[:, None]
    exact, coarse = (
        path_derivative(noised, Student(), target, settings, coordinates)
        for settings in (ContinuousConfig(), ContinuousConfig(tangent="central", central_step=step))
    )
    # Of second order inside; the last time is nearer to the end than one step, from which it goes one way.
    assert float((coarse - exact)[:2].abs().max()) < 1e-5
    assert float((coarse - exact)[2].abs().max()) < 2e-3
    after, before = (angle_from_time(time) if coordinates == "trigflow" else time for time in seen[-2:])
    torch.testing.assert_close((after - before)[:2], torch.full((2,), 2 * step, dtype=torch.float64), rtol=1e-6, atol=0)
