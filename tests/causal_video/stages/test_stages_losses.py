"""Losses on given videos against numbers worked out by hand, and the adversarial ones against closed forms."""

import math

import pytest
import torch
from torch import nn

from fewstep.causal_video.stages.asd import (
    PERTURBATION,
    StepDiscriminator,
    gradient_penalties,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)
from fewstep.causal_video.stages.forcing import bell_weight, forcing_loss
from fewstep.causal_video.stages.losses import counted_weight, frame_loss
from tests.tiny_networks import draw

VIDEO = (2, 3, 4, 2, 2)


def video(seed: int) -> torch.Tensor:
    return draw(VIDEO, seed, torch.float64)


def test_bell_is_zero_at_both_ends() -> None:
    t = torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    expected = [0.0, 1 - math.exp(-0.5), 0.0, math.exp(-0.125) - math.exp(-0.5)]
    assert bell_weight(t).tolist() == pytest.approx(expected, abs=1e-15)


def test_frame_loss_is_the_weighted_mean_written_out() -> None:
    prediction, target = video(0).requires_grad_(), video(1)
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    per_frame = (prediction - target).square().mean(dim=(1, 3, 4))
    expected = float((weight * per_frame).detach().sum(dim=1).mean())
    found = frame_loss(prediction, target, weight, frames="sum")
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-14)
    mean = frame_loss(prediction, target, weight, frames="mean")
    assert float(mean.loss.detach()) == pytest.approx(expected / 4, rel=1e-14)
    (gradient,) = torch.autograd.grad(found.loss, prediction)
    assert gradient[0, :, 1].abs().max() == 0
    assert torch.allclose(gradient[0, :, 2], 2 * 2.0 * (prediction - target)[0, :, 2] / (12 * 2))
    with pytest.raises(ValueError, match=r"must be \[2, 4\], got \[2\]"):
        frame_loss(prediction, target, weight[:, 0])
    with pytest.raises(ValueError, match="choose mean or sum"):
        frame_loss(prediction, target, weight, frames="max")  # pyright: ignore[reportArgumentType]


def test_forcing_loss_vanishes_at_the_conditional_velocity_and_isolates_samples() -> None:
    x0, eps, weight = video(2), video(3), torch.ones(2, 4)
    assert float(forcing_loss(eps - x0, x0, eps, weight).loss) == 0
    velocity = (eps - x0 + 0.5).requires_grad_()
    assert float(forcing_loss(velocity, x0, eps, weight).loss.detach()) == pytest.approx(0.25, rel=1e-12)
    broken = velocity.detach().clone()
    broken[1, 0, 0, 0, 0] = torch.nan
    broken.requires_grad_()
    found = forcing_loss(broken, x0, eps, weight)
    assert found.isolated.tolist() == [False, True]
    assert float(found.loss.detach()) == pytest.approx(0.125, rel=1e-12)
    (gradient,) = torch.autograd.grad(found.loss, broken)
    assert gradient[1].abs().max() == 0
    assert bool(gradient.isfinite().all())


def test_counted_weight_makes_the_mean_over_what_counts() -> None:
    counts = torch.tensor([[True, False, True, True], [False, False, False, True]])
    prediction, target = video(4), video(5)
    per_frame = (prediction - target).square().mean(dim=(1, 3, 4))
    found = frame_loss(prediction, target, counted_weight(counts)).loss
    assert float(found) == pytest.approx(float(per_frame[counts].mean()), rel=1e-6)
    assert float(counted_weight(torch.zeros(2, 3, dtype=torch.bool)).abs().max()) == 0


def test_relativistic_losses_mirror_each_other() -> None:
    fewer, more = draw((5,), 0, torch.float64), draw((5,), 1, torch.float64)
    generator, discriminator = relativistic_generator_loss(fewer, more), relativistic_discriminator_loss(fewer, more)
    assert float(generator) == pytest.approx(float(torch.log1p(torch.exp(more - fewer)).mean()), rel=1e-12)
    assert float(generator - discriminator) == pytest.approx(float((more - fewer).mean()), rel=1e-9)
    assert float(relativistic_generator_loss(fewer, fewer)) == pytest.approx(math.log(2), rel=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        relativistic_generator_loss(fewer, more[:4])


def test_penalties_of_a_linear_discriminator_are_its_squared_slope() -> None:
    x, noise = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    slope = 0.7
    moved = slope * (x + PERTURBATION * noise)
    found = gradient_penalties((slope * x, slope * x), (moved, moved))
    assert float(found) == pytest.approx(2 * slope**2, rel=1e-10)


def test_each_pair_of_steps_has_its_own_logit() -> None:
    judge = StepDiscriminator([6], width=8, pairs=2, seed=3)
    nn.init.constant_(judge.heads[1].heads[0].logit.bias, 2.5)  # pyright: ignore
    features = [draw((4, 6, 5), 1, torch.float32)]
    assert judge(features, 1).tolist() == [0.0] * 4
    assert judge(features, 2).tolist() == pytest.approx([2.5] * 4)
    judge(features, 2).sum().backward()
    assert float(judge.heads[0].heads[0].logit.bias.grad.abs().max()) == 0  # pyright: ignore
    with pytest.raises(ValueError, match="from 1 to 2, got 3"):
        judge(features, 3)
    with pytest.raises(ValueError, match="needs a pair"):
        StepDiscriminator([6], width=8, pairs=0, seed=3)
