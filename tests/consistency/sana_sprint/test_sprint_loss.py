"""Drawn guidance, noise levels and judged pairs of SANA-Sprint, and its change of coordinates."""

import math
from typing import Any

import pytest
import torch

from fewstep.consistency.methods.scm import trig_tangent
from fewstep.consistency.sana_sprint.config import SprintConfig, SprintConsistencyConfig, SprintDiscriminatorConfig
from fewstep.consistency.sana_sprint.loss import drawn_guidance, judged_pairs, judged_times
from fewstep.consistency.tangents import total_derivative
from fewstep.consistency.times import mix_max_time
from fewstep.consistency.trigflow import (
    angle_from_time,
    from_trig_state,
    time_from_angle,
    to_trig_state,
    trig_from_velocity,
    trig_function,
    x0_from_trig,
)
from fewstep.core.condition import Condition
from fewstep.dmd.gan_loss import hinge_discriminator_loss, hinge_generator_loss
from tests.consistency.analytic import Gaussian, fp64
from tests.consistency.sana_sprint.tiny_sprint_run import HEADS


def test_teacher_in_trigflow_is_the_arithmetic_of_the_stock_pipeline() -> None:
    # SanaSprintPipeline with sigma_data 1/2, written out: state and prediction are both divided by it at the end.
    gaussian, sigma_data = Gaussian(), 0.5
    tau = fp64(0.2, 0.9, 1.3, 1.5)
    x = fp64(0.4, -1.0, 0.3, 2.0)
    t = torch.sin(tau) / (torch.cos(tau) + torch.sin(tau))
    root = torch.sqrt(t**2 + (1 - t) ** 2)
    state = x / sigma_data * root
    v = gaussian.velocity(state, t)
    prediction = ((1 - 2 * t) * state + (1 - 2 * t + 2 * t**2) * v) / root * sigma_data
    theirs = (torch.cos(tau) * x - torch.sin(tau) * prediction) / sigma_data
    x_t, time = from_trig_state(x / sigma_data, tau)
    ours = x0_from_trig(x / sigma_data, trig_from_velocity(x_t, gaussian.velocity(x_t, time), tau), tau)
    assert (ours - theirs).abs().max() < 1e-12
    assert (ours - (x_t - time * gaussian.velocity(x_t, time))).abs().max() < 1e-12


def test_exact_consistency_network_has_no_tangent_in_these_coordinates() -> None:
    gaussian = Gaussian()
    x_t, t = fp64(0.4, -1.0, 0.3, 2.0), fp64(0.1, 0.4, 0.7, 0.97)
    x_tau, tau = to_trig_state(x_t, t)
    function = trig_function(lambda x, time: gaussian.flow_student(x, time))
    target = trig_from_velocity(x_t, gaussian.velocity(x_t, t), tau)
    pace = torch.cos(tau) * torch.sin(tau)
    derivative = total_derivative(function, x_tau, tau, pace * target, pace).derivative
    tangent = trig_tangent(x_tau, function(x_tau, tau), target, derivative, tau)
    assert tangent.total.abs().max() < 1e-12
    assert tangent.gap.abs().max() > 0.1


def test_max_time_is_pure_noise_where_everything_is_finite() -> None:
    t = mix_max_time(torch.rand(64), torch.rand(64), share=1.0, maximum=1.0)
    assert torch.equal(t, torch.ones(64))
    tau = angle_from_time(t)
    assert torch.equal(tau, torch.full((64,), math.pi / 2))
    network = trig_from_velocity(torch.randn(64, 3), torch.randn(64, 3), tau)
    assert bool(torch.isfinite(network).all())
    assert network.abs().max() > 0


def test_drawn_guidance_takes_each_scale_alike() -> None:
    uniform = (torch.arange(300) + 0.5) / 300
    scales = drawn_guidance(uniform, (4.0, 4.5, 5.0))
    assert scales.unique(return_counts=True)[1].tolist() == [100, 100, 100]
    assert scales[0] == 4.0
    assert drawn_guidance(torch.tensor([1 - 2**-24]), (4.0, 5.0)).item() == 5.0
    with pytest.raises(ValueError, match="scales is empty"):
        drawn_guidance(uniform, ())


def test_judged_times_have_their_law() -> None:
    normal = fp64(-2.0, 0.0, 1.0)
    t = judged_times(normal)
    # log(t / (1 - t)) = log tan of the angle, shifted by log 2 because the law is stated for sigma_data 1/2.
    assert torch.allclose(torch.logit(t), -0.6 + normal + math.log(2), rtol=0, atol=1e-12)
    assert torch.allclose(angle_from_time(t), torch.atan(torch.exp(-0.6 + normal) / 0.5), rtol=0, atol=1e-12)
    assert torch.allclose(time_from_angle(angle_from_time(t)), t, rtol=0, atol=1e-12)


def test_misaligned_pairs_are_fakes_with_the_neighbours_prompt() -> None:
    real = torch.arange(4.0).view(4, 1)
    condition = Condition(torch.arange(4.0).view(4, 1, 1))
    pairs = judged_pairs(-1 - real, real, condition, misaligned=True)
    assert pairs.fakes == 8
    assert pairs.x0.flatten().tolist() == [-1, -2, -3, -4, 3, 0, 1, 2, 0, 1, 2, 3]
    assert pairs.condition.text.flatten().tolist() == [0, 1, 2, 3] * 3
    assert judged_pairs(-1 - real, real, condition, misaligned=False).fakes == 4
    alone = judged_pairs(real[:1], real[:1], condition.index(slice(0, 1)), misaligned=True)
    assert (alone.fakes, len(alone.x0), alone.condition.batch_size) == (1, 2, 2)
    with pytest.raises(ValueError, match="one batch"):
        judged_pairs(real[:2], real, condition, misaligned=True)


def test_hinge_values() -> None:
    fake, real = fp64(-2.0, 0.5), fp64(3.0, 0.0)
    assert hinge_discriminator_loss(fake, real).item() == pytest.approx(0.5 * (1.5 / 2 + 1 / 2))
    assert hinge_generator_loss(fake).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (SprintDiscriminatorConfig, {**HEADS, "max_time_share": 1.5}, "max_time_share: given 1.5"),
        (SprintDiscriminatorConfig, {**HEADS, "weight": 0.0}, "leave the section out for none"),
        (SprintDiscriminatorConfig, {**HEADS, "noise_std": 0.0}, "noise_std is 0.0"),
        (SprintConsistencyConfig, {"weight": -1.0}, "leave the section out for none"),
        (SprintConsistencyConfig, {"central_step": 0.01}, "central_step: given 0.01, which only tangent 'central'"),
        (SprintConfig, {"consistency": SprintConsistencyConfig(), "guidance_scales": (0.5,)}, "scales of 1 or more"),
        (SprintConfig, {"consistency": SprintConsistencyConfig(), "guidance_scales": ()}, r"guidance_scales is \(\)"),
    ],
)
def test_values_that_do_not_fit_are_named(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)
