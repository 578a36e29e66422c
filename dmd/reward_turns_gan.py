"""Flash-DMD's pixel GAN in the loop: what late steps and the discriminator minimise on one slice.

Legend: n samples of one slice; x0 [n, C, h, w].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.paths import x0_from_velocity
from fewstep.core.roles import frozen
from fewstep.dmd.gan_loss import discriminator_loss, generator_gan_loss
from fewstep.dmd.reward_setup import RewardSetup
from fewstep.dmd.reward_turns_rollout import Rollout


def pixel_gan_loss(
    setup: RewardSetup, rollout: Rollout, j: int, *, velocity: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The student's non-saturating loss on the decoded prediction of call j; `velocity` carries its graph.

    Flash-DMD (arXiv:2511.20549), stage 1: late steps learn texture from real pictures instead of from scores.
    """
    assert setup.pixel_role is not None
    state = rollout.states[j]
    t = torch.full((len(state),), setup.student.times[j], dtype=state.dtype, device=state.device)
    discriminator = setup.pixel_role.module
    with frozen(discriminator):
        logits = discriminator(setup.teacher.decode(x0_from_velocity(state, velocity, t)))
    loss = generator_gan_loss(logits)
    return loss, {"student_gan_loss": loss.detach()}


def discriminator_turn(setup: RewardSetup, rollout: Rollout, j: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss on the predictions of call j against as many real pictures, in one call."""
    assert setup.pixel_role is not None
    assert setup.pixel_real is not None
    with torch.no_grad():
        fake = setup.teacher.decode(rollout.predictions[j])
    real = setup.pixel_real.pixels(rollout.draw.indices, setup.teacher, device=setup.device)
    fake_logits, real_logits = setup.pixel_role.wrapped(torch.cat([fake, real])).split(len(fake))
    loss = discriminator_loss(fake_logits, real_logits)
    gap = (real_logits.mean() - fake_logits.mean()).detach()
    return loss, {"discriminator_loss": loss.detach(), "discriminator_gap": gap}
