"""What a turn is given and what it returns: noised data, the networks it may call, and the loss with its record.

Legend: B batch; x0, eps, x_t [B, C, h, w]; t [B] in [0, 1] with noise at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.consistency.config import ConsistencyLossConfig
from fewstep.consistency.times import logit_normal, mix_max_time
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher


@dataclass(frozen=True)
class Noised:
    """Data of one batch with the noise and the time they are noised to.

    `step` counts the steps of the run, `progress` in [0, 1] is the share of them that is done.
    """

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Condition
    step: int
    progress: float = 0.0

    @property
    def x_t(self) -> Tensor:
        return add_noise(self.x0, self.eps, self.t)


@dataclass(frozen=True)
class Networks:
    """The student bare and wrapped, the teacher with its guidance, and perhaps the learned weight of a time.

    Forward mode does not pass through the hooks of a distributed wrapper: `student` is called for what has no gradient,
    `wrapped` for what has one.
    """

    student: nn.Module
    wrapped: nn.Module
    teacher: Teacher
    guidance: float
    time_weight: nn.Module | None = None

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher.velocity(x_t, t, condition, self.guidance)


@dataclass(frozen=True)
class ConsistencyTurn:
    """The student's loss, and what to log of it; 0-dim tensors without graph."""

    loss: Tensor
    record: dict[str, Tensor]


def noise_data(
    x0: Tensor,
    condition: Condition,
    *,
    draw: Draw,
    loss: ConsistencyLossConfig,
    first_time: float,
    step: int,
    progress: float = 0.0,
) -> Noised:
    """A random time for each sample: logit-normal, and the student's first time for a share of the samples."""
    t = logit_normal(draw.noise((), "consistency_time"), mean=loss.time_mean, std=loss.time_std)
    t = mix_max_time(t, draw.uniform("consistency_max_time"), share=loss.max_time_share, maximum=first_time)
    return Noised(x0, draw.noise(tuple(x0.shape[1:]), "consistency_noise"), t, condition, step, progress)
