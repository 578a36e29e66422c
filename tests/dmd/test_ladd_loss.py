"""Hinge losses and misaligned pairs."""

import pytest
import torch

from fewstep.dmd.gan_loss import hinge_discriminator_loss, hinge_generator_loss, misaligned_samples


def test_values() -> None:
    fake, real = torch.tensor([[-2.0, 0.5]]), torch.tensor([[0.0, 3.0]])
    assert hinge_generator_loss(fake).item() == pytest.approx(0.75)
    assert hinge_discriminator_loss(fake, real).item() == pytest.approx(0.5 * (0.5 + 0.75))
    assert hinge_discriminator_loss(torch.zeros(3), torch.zeros(5)).item() == pytest.approx(1.0)
    # The clamped form of the MCM code is twice this, less 2.
    clamped = torch.clamp(-real, min=-1).mean() + torch.clamp(fake, min=-1).mean()
    assert clamped.item() == pytest.approx(2 * hinge_discriminator_loss(fake, real).item() - 2)


def test_no_gradient_beyond_the_margin() -> None:
    fake = torch.tensor([-1.5, -0.5], requires_grad=True)
    real = torch.tensor([1.5, 0.5], requires_grad=True)
    by_fake, by_real = torch.autograd.grad(hinge_discriminator_loss(fake, real), (fake, real))
    assert by_fake.tolist() == [0.0, 0.25]
    assert by_real.tolist() == [0.0, -0.25]
    assert torch.autograd.grad(hinge_generator_loss(fake), fake)[0].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_misaligned_samples_never_keep_their_place(batch: int) -> None:
    x0 = torch.arange(batch, dtype=torch.float32).view(batch, 1, 1).expand(batch, 2, 2)
    rolled = misaligned_samples(x0)
    assert rolled.shape == x0.shape
    assert bool((rolled[:, 0, 0] != x0[:, 0, 0]).all())
    assert sorted(rolled[:, 0, 0].tolist()) == x0[:, 0, 0].tolist()


def test_a_batch_of_one_has_no_wrong_text() -> None:
    x0 = torch.randn(1, 4, 8)
    assert misaligned_samples(x0).shape == (0, 4, 8)
    assert torch.equal(torch.cat([x0, misaligned_samples(x0)]), x0)


def test_half_precision_logits_count_in_fp32() -> None:
    logits = torch.full((70_000,), 0.5, dtype=torch.bfloat16)
    assert hinge_generator_loss(logits).item() == pytest.approx(-0.5)
    assert hinge_discriminator_loss(logits, logits).dtype == torch.float32
