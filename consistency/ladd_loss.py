"""Hinge losses of SANA-Sprint's latent adversarial term (arXiv:2503.09641), and its misaligned pairs.

`dmd/gan_loss.py` has the logistic losses. A logit is high for real data; logits are [B] or [B, ...], one per head or
patch, all counted alike. Arithmetic in fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32


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
