"""Adversarial losses on discriminator logits, and an R1 penalty without second derivatives.

A logit is high for real data; at the optimum it is log p_real(x_t) - log p_student(x_t). Logits are [B] or [B, ...]
(one per head or patch): all count alike. Arithmetic in fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32


def generator_gan_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-logit): the non-saturating loss of the student (DMD2, arXiv:2405.14867, Sec. 4.3).

    fake_logits are those of the noised student samples, with the graph through the discriminator to the student.
    """
    return functional.softplus(-at_least_fp32(fake_logits)).mean()


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real); 2 log 2 at chance (DMD2, arXiv:2405.14867, Sec. 4.3).

    fake_logits belong to noised student samples, cut from the student's graph, real_logits to real data noised with
    times and noise of their own.
    """
    fake, real = at_least_fp32(fake_logits), at_least_fp32(real_logits)
    return functional.softplus(fake).mean() + functional.softplus(-real).mean()


def perturb_noised_input(x_t: Tensor, noise: Tensor, *, scale: float = 0.1) -> Tensor:
    """x_t + scale noise: the second input of `approximate_r1_penalty`.

    x_t is the noised real sample that gave the first logit, at the same time t; the clean sample would be a state that
    the discriminator never sees at t. noise is standard normal and independent of x_t.

    Raises:
        ValueError: the shapes differ, or scale is not positive.
    """
    if noise.shape != x_t.shape:
        raise ValueError(f"noise must have the shape of x_t {tuple(x_t.shape)}, got {tuple(noise.shape)}")
    if scale <= 0:
        raise ValueError(f"the scale of the perturbation must be positive, got {scale}")
    return x_t + scale * noise


def approximate_r1_penalty(real_logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """mean (real - perturbed)^2, about scale^2 |grad logit|^2 for a small perturbation (APT, arXiv:2501.08316).

    Divide by scale^2 to weigh it like an exact R1 penalty. Both logits carry gradients to the discriminator.

    Raises:
        ValueError: the shapes differ.
    """
    if real_logits.shape != perturbed_logits.shape:
        raise ValueError(
            f"both logits must have one shape, got {tuple(real_logits.shape)} and {tuple(perturbed_logits.shape)}"
        )
    return (at_least_fp32(real_logits) - at_least_fp32(perturbed_logits)).square().mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean logit of the noised student samples, with the graph through the frozen features to the student."""
    return -at_least_fp32(fake_logits).mean()


def hinge_discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2: 1 at chance, and no gradient from a sample beyond its margin.

    Logits of `misaligned_samples` belong to the fakes.
    """
    fake, real = at_least_fp32(fake_logits), at_least_fp32(real_logits)
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def misaligned_samples(x0: Tensor) -> Tensor:
    """x0 [B, ...] rolled by one, to be judged with the prompts of the original order: real pictures, wrong text.

    No sample keeps its place. A batch of one has no wrong text: the result is empty, [0, ...], so that joining it to
    the fakes does nothing. Equal prompts within a batch are not seen.
    """
    return x0.roll(1, dims=0) if len(x0) > 1 else x0[:0]
