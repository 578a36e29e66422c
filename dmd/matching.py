"""The two turns of DMD: what the student and the fake score minimise on one batch.

Networks are called here, arithmetic is in the loss files. Legend: B batch; x0, x_t, eps [B, C, H, W]; t [B] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.fake_score import FakeScore, FakeScoreOutput
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher
from fewstep.dmd.config import LossConfig
from fewstep.dmd.f_divergence import density_ratio, divergence_weight, saturated_share, unit_mean
from fewstep.dmd.gan_loss import discriminator_loss, generator_gan_loss
from fewstep.dmd.loss import MatchingStatistics, distribution_matching_loss, fake_score_loss, matching_statistics
from fewstep.dmd.sid_loss import sid_loss


@dataclass(frozen=True)
class StudentTurn:
    """The student's loss with its parts; `matching` compares the scores at this batch's x_t."""

    loss: Tensor
    matching: MatchingStatistics
    gan_loss: Tensor | None = None
    saturated_share: Tensor | None = None

    def log(self) -> dict[str, Tensor]:
        """Metrics by name; 0-dim, without graph."""
        record = {f"matching_{field.name}": getattr(self.matching, field.name) for field in fields(self.matching)}
        if self.gan_loss is not None:
            record["student_gan_loss"] = self.gan_loss.detach()
        if self.saturated_share is not None:
            record["saturated_share"] = self.saturated_share
        return record


@dataclass(frozen=True)
class FakeScoreTurn:
    """The fake score's loss with its parts."""

    loss: Tensor
    flow_loss: Tensor
    discriminator_loss: Tensor | None = None


def student_turn(
    x0: Tensor,
    condition: Condition,
    *,
    teacher: Teacher,
    fake_score: FakeScore,
    guidance: float,
    loss: LossConfig,
    draw: Draw,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> StudentTurn:
    """The student's loss on its samples x0 (with graph).

    Both scores are read at the same freshly noised x_t, the fake one without guidance. `fake_score` is the bare module
    with its parameters frozen by the caller: for SiD and the GAN gradients pass through it to x0. f-distill divides its
    weights by their mean, for which `mean_over_processes` averages a 0-dim tensor over the processes of the run.
    """
    shape = tuple(x0.shape[1:])
    t, eps = draw.times("score_time", shift=loss.score_shift, interval=loss.interval), draw.noise(shape, "score_noise")
    through_networks = loss.objective == "sid"
    with torch.set_grad_enabled(through_networks):
        x_t = add_noise(x0 if through_networks else x0.detach(), eps, t)
        output = fake_score(x_t, t, condition)
        fake_x0 = x0_from_velocity(x_t, output.velocity, t)
        real_x0 = teacher.x0(x_t, t, condition, guidance)

    saturated = None
    if loss.objective == "sid":
        total = sid_loss(x0, fake_x0, real_x0, alpha=loss.sid_alpha)
    elif loss.objective == "f_distill":
        logits = require_logits(output)
        weight, saturated = divergence_weight(density_ratio(logits), loss.divergence), saturated_share(logits)
        weight = unit_mean(weight, mean=mean_over_processes(weight.mean()))
        total = distribution_matching_loss(x0, fake_x0, real_x0, weight=weight)
    else:
        total = distribution_matching_loss(x0, fake_x0, real_x0)

    gan_loss = None
    if loss.gan_weight > 0:
        gan_t, gan_eps = (
            draw.times("gan_time", shift=loss.fake_shift, interval=loss.interval),
            draw.noise(shape, "gan_noise"),
        )
        gan_loss = generator_gan_loss(require_logits(fake_score(add_noise(x0, gan_eps, gan_t), gan_t, condition)))
        total = total + loss.gan_weight * gan_loss
    return StudentTurn(total, matching_statistics(x0, fake_x0, real_x0), gan_loss, saturated)


def fake_score_turn(
    x0: Tensor,
    condition: Condition,
    *,
    fake_score: nn.Module,
    loss: LossConfig,
    draw: Draw,
    real: tuple[Tensor, Condition] | None = None,
) -> FakeScoreTurn:
    """The fake score's loss on the student's samples x0 (without graph), with the discriminator's when `real` is given.

    `fake_score` may be a distributed wrapper: it is called once, on the batch or on [batch, fakes, reals] joined.
    """
    shape = tuple(x0.shape[1:])
    t, eps = draw.times("fake_time", shift=loss.fake_shift, interval=loss.interval), draw.noise(shape, "fake_noise")
    x_t = add_noise(x0, eps, t)
    if real is None:
        flow = fake_score_loss(fake_score(x_t, t, condition).velocity, x0, eps)
        return FakeScoreTurn(flow, flow)

    latents, real_condition = real
    size = len(x0)
    times, states = [t], [x_t]
    for name, clean in (("fake", x0), ("real", latents)):
        times.append(draw.times(f"discriminator_{name}_time", shift=loss.fake_shift, interval=loss.interval))
        states.append(add_noise(clean, draw.noise(shape, f"discriminator_{name}_noise"), times[-1]))
    joined = Condition.cat([condition, condition, real_condition])
    output = fake_score(torch.cat(states), torch.cat(times), joined)
    _, fake_logits, real_logits = require_logits(output).split(size)
    flow = fake_score_loss(output.velocity[:size], x0, eps)
    adversarial = discriminator_loss(fake_logits, real_logits)
    return FakeScoreTurn(flow + loss.discriminator_weight * adversarial, flow, adversarial)


def require_logits(output: FakeScoreOutput) -> Tensor:
    """The discriminator's logits. Raises ValueError when the fake score was built without heads."""
    if output.logits is None:
        raise ValueError("this loss reads a discriminator, and the fake score has no heads: set loss.gan_weight > 0")
    return output.logits
