"""What a step is given and what it returns: data with noise, the networks it may call, and the loss with its record.

Legend: B batch; x0, eps, x_t [B, C, h, w], or [B, C, F, h, w] for videos; t [B] in [0, 1] with noise at 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.consistency.sections import TimesConfig
from fewstep.consistency.times import logit_normal, mix_max_time
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher


@dataclass(frozen=True)
class Noised:
    """Data of one batch with the noise and the time they are noised to; `step` counts the steps of the run."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    condition: Condition
    step: int

    @property
    def x_t(self) -> Tensor:
        return add_noise(self.x0, self.eps, self.t)


@dataclass(frozen=True)
class DataBatch:
    """One slice of data with noise and random numbers; a method chooses the times to which it is noised.

    `step` counts the steps of the run, `progress` in [0, 1] is the share of them that is done, `first_time` is the
    largest time of the student's sampler.
    """

    x0: Tensor
    eps: Tensor
    condition: Condition
    draw: Draw
    step: int
    progress: float = 0.0
    first_time: float = 1.0

    def at(self, t: Tensor) -> Noised:
        """The data noised to t [B]."""
        return Noised(self.x0, self.eps, t, self.condition, self.step)


@dataclass(frozen=True)
class Networks:
    """The student bare and wrapped, the teacher with its guidance, and what some methods have beside them.

    Forward mode does not pass through the hooks of a distributed wrapper: `student` is called for what has no gradient,
    `wrapped` for what has one. `time_weight` is the learned weight of a time, `heads` a discriminator on the teacher's
    features: the bare module in the student's steps, where it collects no gradients, the wrapped one in its own.
    """

    student: nn.Module
    wrapped: nn.Module
    teacher: Teacher
    guidance: float
    time_weight: nn.Module | None = None
    heads: nn.Module | None = None

    def student_on(self, rows: Tensor) -> nn.Module:
        """The bare student for these samples of the batch alone; the same, where it is told all by its condition."""
        return self.student

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher.velocity(x_t, t, condition, self.guidance)


@dataclass(frozen=True)
class ConsistencyStep:
    """The student's loss, and what to log of it; 0-dim tensors without graph."""

    loss: Tensor
    record: dict[str, Tensor]


def random_times(data: DataBatch, settings: TimesConfig) -> Tensor:
    """A time for each sample [B]: logit-normal, and the student's first time for a share of the samples."""
    t = logit_normal(data.draw.noise((), "consistency_time"), mean=settings.time_mean, std=settings.time_std)
    uniform = data.draw.uniform("consistency_max_time")
    return mix_max_time(t, uniform, share=settings.max_time_share, maximum=data.first_time)
