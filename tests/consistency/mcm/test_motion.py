"""Motion maps: what they see, what they are blind to, and the loss on them."""

import math

import pytest
import torch

from fewstep.consistency.mcm.motion import motion_loss, motion_map

SHAPE = (2, 3, 8, 4, 5)


def test_difference_is_blind_to_appearance() -> None:
    video = torch.randn(SHAPE, dtype=torch.float64)
    still = torch.randn(2, 3, 1, 4, 5, dtype=torch.float64)
    assert motion_map(video, "difference").shape == (2, 3, 7, 4, 5)
    assert motion_loss(video + still, video, "difference").item() == pytest.approx(0.0, abs=1e-12)
    assert motion_loss(video + still, video, "raw").item() > 0.1
    assert motion_loss(video + still, video, "high").item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("frames", [1, 7, 8])
def test_low_and_high_add_up(frames: int) -> None:
    video = torch.randn(2, 3, frames, 4, 5, dtype=torch.float64)
    low, high = motion_map(video, "low"), motion_map(video, "high")
    torch.testing.assert_close(low + high, video, rtol=0, atol=1e-12)
    torch.testing.assert_close(motion_map(low, "low"), low, rtol=0, atol=1e-12)
    torch.testing.assert_close(motion_map(video, "low", cutoff=1.0), video, rtol=0, atol=1e-12)
    mean = video.mean(dim=2, keepdim=True).expand_as(video)
    torch.testing.assert_close(motion_map(video, "low", cutoff=0.0), mean, rtol=0, atol=1e-12)


def test_frequencies_are_counted_against_the_highest() -> None:
    frame = torch.arange(8, dtype=torch.float64).view(1, 1, 8, 1, 1)
    slow, fast = torch.cos(math.pi / 4 * frame), torch.cos(math.pi * frame)
    torch.testing.assert_close(motion_map(slow + fast, "low", cutoff=0.25), slow, rtol=0, atol=1e-12)
    torch.testing.assert_close(motion_map(slow + fast, "high", cutoff=0.25), fast, rtol=0, atol=1e-12)


def test_correlation_of_frames() -> None:
    video = torch.randn(SHAPE, dtype=torch.float64)
    correlation = motion_map(video, "correlation")
    assert correlation.shape == (2, 8, 8, 4, 5)
    expected = sum(video[1, c, 2, 3, 4] * video[1, c, 6, 3, 4] for c in range(3)) / 3
    assert correlation[1, 2, 6, 3, 4].item() == pytest.approx(float(expected))
    # Blind to a rotation of the channels.
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = torch.einsum("cd,bdfhw->bcfhw", rotation, video)
    assert motion_loss(turned, video, "correlation").item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["raw", "difference", "low", "high", "correlation"])
def test_loss_is_elementwise_and_has_one_gradient(kind: str) -> None:
    prediction, target = torch.randn(2, *SHAPE, dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    loss = motion_loss(prediction, target, kind, constant=0.01)  # type: ignore[arg-type]
    difference = motion_map(prediction, kind) - motion_map(target, kind)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(((difference.square() + 1e-4).sqrt() - 0.01).mean().item())
    by_prediction, by_target = torch.autograd.grad(loss, (prediction, target), allow_unused=True)
    assert by_prediction.abs().max().item() > 0
    assert by_target is None


def test_raw_gradient_stays_on_the_frames_that_differ() -> None:
    target = torch.randn(SHAPE, dtype=torch.float64)
    prediction = target.clone()
    prediction[:, :, [2, 5]] += 1.0
    gradient = torch.autograd.grad(motion_loss(prediction.requires_grad_(), target, "raw"), prediction)[0]
    changed = gradient.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert changed.nonzero().flatten().tolist() == [2, 5]


def test_bad_arguments_are_named() -> None:
    video = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"needs latents \[B, C, F, H, W\]"):
        motion_map(video[0], "raw")
    with pytest.raises(ValueError, match="choose raw, difference"):
        motion_map(video, "flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cutoff must lie"):
        motion_map(video, "low", cutoff=1.5)
    with pytest.raises(ValueError, match="one shape"):
        motion_loss(video, video[:, :, 1:], "raw")
