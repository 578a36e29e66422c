"""The arithmetic of SANA-Sprint (arXiv:2503.09641) beside sCM: drawn guidance, noise levels, and pairs to judge.

Its sCM half is in `methods/scm.py`, its hinge losses and misaligned pairs are in `dmd/gan_loss.py`, its change of
coordinates is in `trigflow.py`. Legend: B batch; x0 [B, ...]; uniform, normal [B].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.consistency.times import lognormal_tan
from fewstep.consistency.trigflow import time_from_angle
from fewstep.core.condition import Condition
from fewstep.dmd.gan_loss import misaligned_samples


def drawn_guidance(uniform: Tensor, scales: tuple[float, ...]) -> Tensor:
    """One of the scales for each sample, all alike probable: [B], fp32 at least.

    Args:
        uniform: [B] in [0, 1).
        scales: at least one.

    Raises:
        ValueError: there is no scale.
    """
    if not scales:
        raise ValueError("scales is empty; give at least one guidance scale")
    choices = torch.tensor(scales, dtype=torch.promote_types(uniform.dtype, torch.float32), device=uniform.device)
    # A uniform number close to 1 may be rounded up by the product.
    return choices[(uniform * len(scales)).long().clamp(max=len(scales) - 1)]


def judged_times(normal: Tensor, *, mean: float = -0.6, std: float = 1.0, sigma_data: float = 0.5) -> Tensor:
    """Canonical times [B] of the discriminator's inputs, tan(tau) = exp(mean + std normal) / sigma_data.

    tau is the angle of data of any scale; t = sin / (sin + cos) is that of latents with variance one.
    """
    return time_from_angle(lognormal_tan(normal, mean=mean, std=std, sigma_data=sigma_data))


@dataclass(frozen=True, eq=False)
class JudgedPairs:
    """What the discriminator looks at: x0 [M, ...] with their prompts, the `fakes` first ones of which are fake."""

    x0: Tensor
    condition: Condition
    fakes: int


def judged_pairs(fake: Tensor, real: Tensor, condition: Condition, *, misaligned: bool) -> JudgedPairs:
    """The student's samples and, as fakes too, real data with the next sample's prompt; then the real pairs.

    A batch of one has no wrong prompt, so none is made of it.

    Raises:
        ValueError: shapes differ.
    """
    if fake.shape != real.shape or len(real) != condition.batch_size:
        raise ValueError(
            f"fake {tuple(fake.shape)}, real {tuple(real.shape)} and {condition.batch_size} prompts must be one batch"
        )
    wrong = misaligned_samples(real) if misaligned else real[:0]
    x0 = torch.cat([fake, wrong, real])
    prompts = [condition, condition, condition] if len(wrong) > 0 else [condition, condition]
    return JudgedPairs(x0, Condition.cat(prompts), len(fake) + len(wrong))
