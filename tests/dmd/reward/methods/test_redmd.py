"""Reward weights: normalisation, effective sample size, space-time profiles, and the fixed point that stays."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.dmd.loss import distribution_matching_loss
from fewstep.dmd.reward.methods.redmd import latent_saliency, rollout_weights, space_time_weight
from tests.dmd.gaussian_bench import Gaussian, hermite_grid

TEACHER = Gaussian(0.7, 1.3)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(-2, 2))
def test_weights_have_mean_one_and_ignore_a_constant(rewards: list[float], shift: float) -> None:
    values = tensor(*rewards)
    result = rollout_weights(values, tilt_scale=2.0, max_weight=1e9)
    assert float(result.weight.mean()) == pytest.approx(1.0)
    moved = rollout_weights(values + shift, tilt_scale=2.0, max_weight=1e9)
    torch.testing.assert_close(moved.weight, result.weight, rtol=1e-9, atol=1e-9)
    assert 1 / len(rewards) - 1e-9 <= float(result.effective_share) <= 1 + 1e-9


def test_ratio_of_two_weights_and_zero_scale() -> None:
    result = rollout_weights(tensor(0.5, -0.25), tilt_scale=2.0)
    assert float(result.weight[0] / result.weight[1]) == pytest.approx(math.exp(1.5))
    assert rollout_weights(tensor(0.5, -0.25), tilt_scale=0.0).weight.tolist() == [1.0, 1.0]
    # No overflow from a reward of unfit scale.
    assert rollout_weights(tensor(1e4, 0.0), tilt_scale=2.0).weight.tolist() == pytest.approx([2.0, 0.0])


def test_effective_share_of_normal_rewards_and_the_clip() -> None:
    points, _ = hermite_grid(2, 1)
    assert len(points) == 2
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    rewards = 0.5 * torch.special.ndtri(u)
    result = rollout_weights(rewards, tilt_scale=2.0, max_weight=5.0)
    assert float(result.effective_share) == pytest.approx(math.exp(-1.0), rel=0.01)
    # w = exp(z - 1/2) > 5 for z > log 5 + 1/2.
    assert float(result.clipped_share) == pytest.approx(0.5 * math.erfc((math.log(5) + 0.5) / math.sqrt(2)), rel=0.01)
    assert float(result.weight.max()) == 5.0


def test_weights_over_processes_are_those_of_one() -> None:
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = rollout_weights(rewards, tilt_scale=1.0)
    halves = [rollout_weights(part, tilt_scale=1.0, population=rewards) for part in rewards.chunk(2)]
    torch.testing.assert_close(torch.cat([half.weight for half in halves]), together.weight)
    assert float(halves[1].effective_share) == pytest.approx(float(together.effective_share))


def test_non_finite_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples \[0\] are not finite"):
        rollout_weights(tensor(math.nan, 0.0), tilt_scale=1.0)
    with pytest.raises(ValueError, match="max_weight"):
        rollout_weights(tensor(0.0), tilt_scale=1.0, max_weight=0.5)
    with pytest.raises(ValueError, match="saliency must be finite"):
        space_time_weight(-torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 1))


def make_saliency() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    saliency = torch.rand(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return saliency, torch.randn(2, 3, generator=generator, dtype=torch.float64)


def test_space_time_weight_has_mean_one_and_no_scale() -> None:
    saliency, rewards = make_saliency()
    weight = space_time_weight(saliency, rewards)
    assert weight.shape == (2, 1, 4, 5, 6)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3, 4)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(space_time_weight(1e-6 * saliency, rewards), weight)
    # Floors 0.2 and 0.15 and maxima of one: weights inside a sample span at most 1 / (0.2 0.15) times the frame means.
    assert float(weight.min()) > 0
    assert float(space_time_weight(torch.ones(1, 2, 3, 2, 2), torch.zeros(1, 2)).sub(1).abs().max()) < 1e-6


def test_space_time_weight_golden() -> None:
    saliency = tensor(1.0, 3.0, 4.0, 4.0).view(1, 1, 2, 1, 2)
    # Frame means 2 and 4: profile (0.2, 1) / 0.6. Frame 0: (0.15, 1) / 0.575; frame 1 is flat: ones.
    frames, pixels = (1 / 3, 5 / 3), (0.15 / 0.575, 1 / 0.575)
    expected = [frames[0] * pixels[0], frames[0] * pixels[1], frames[1], frames[1]]
    assert space_time_weight(saliency, torch.zeros(1, 1)).flatten().tolist() == pytest.approx(expected)


def test_weak_axis_counts_more() -> None:
    saliency = torch.zeros(1, 2, 1, 1, 2)
    saliency[0, 0, ..., 0], saliency[0, 1, ..., 1] = 1.0, 1.0
    left, right = space_time_weight(saliency, torch.tensor([[-3.0, 3.0]])).flatten().tolist()
    assert left > right
    assert left + right == pytest.approx(2.0)


def video_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 4, 5, 6)
    x0, fake, real = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return x0.requires_grad_(), fake, real


def test_weighted_gradient_is_the_weight_times_dmds() -> None:
    x0, fake, real = video_batch()
    (plain,) = torch.autograd.grad(distribution_matching_loss(x0, fake, real), x0)
    place = space_time_weight(*make_saliency())
    weight = tensor(0.5, 3.0).requires_grad_()
    for chunks in (None, (1, 3)):
        (alone,) = torch.autograd.grad(distribution_matching_loss(x0, fake, real, chunks=chunks), x0)
        loss = distribution_matching_loss(x0, fake, real, weight=weight, elements=place, chunks=chunks)
        (found,) = torch.autograd.grad(loss, x0)
        torch.testing.assert_close(found, weight.detach().view(2, 1, 1, 1, 1) * place * alone)
        assert loss.item() == pytest.approx(0.5 * float((found * x0.numel()).square().mean()))
        assert (chunks is None) == torch.equal(alone, plain)
    with pytest.raises(ValueError, match="one channel"):
        distribution_matching_loss(x0, fake, real, elements=torch.ones_like(x0))


def test_a_latent_frame_takes_the_mean_of_what_lies_under_it() -> None:
    """Pixel frames 1 + 4 (F - 1), and blocks of pixels: means in closed form; sums are kept."""
    maps = torch.arange(9.0, dtype=torch.float64)[:, None, None].expand(9, 4, 6)[None, None].clone()
    maps[..., 0, 0] += 4.0
    found = latent_saliency(maps, 3, (2, 3))
    assert found.shape == (1, 1, 3, 2, 3)
    # Frame 0; the mean of 1 to 4; that of 5 to 8. One of four pixels carries 4 more.
    assert found[0, 0, :, 1, 1].tolist() == [0.0, 2.5, 6.5]
    assert found[0, 0, :, 0, 0].tolist() == [1.0, 3.5, 7.5]
    assert torch.equal(latent_saliency(maps, 9, (4, 6)), maps)
    with pytest.raises(ValueError, match="9 pixel frames do not fall into 4 latent frames"):
        latent_saliency(maps, 4, (2, 3))


@pytest.mark.parametrize("tilt_scale", [0.0, 2.0, -1.0])
def test_the_teacher_stays_stationary_for_every_weight(tilt_scale: float) -> None:
    # d = 0 pointwise at student = teacher, so no weight moves mean or std; away from it the weighted gradient does.
    points, _ = hermite_grid(12, 2)
    for law, still in ((TEACHER, True), (Gaussian(0.2, 1.3), False)):
        mean = torch.tensor(law.mean, dtype=torch.float64, requires_grad=True)
        std = torch.tensor(law.std, dtype=torch.float64, requires_grad=True)
        x0 = Gaussian(mean, std).sample(points[:, :1])
        x_t = add_noise(x0.detach(), points[:, 1:], torch.full((len(points),), 0.5, dtype=torch.float64))
        weight = rollout_weights(x0.detach()[:, 0], tilt_scale=tilt_scale).weight
        loss = distribution_matching_loss(x0, law.x0(x_t, 0.5), TEACHER.x0(x_t, 0.5), weight=weight)
        gradients = torch.autograd.grad(loss, (mean, std))
        if still:
            assert [float(g) for g in gradients] == [0.0, 0.0]
        else:
            assert float(gradients[0]) < -0.01
