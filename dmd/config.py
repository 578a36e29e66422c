"""Settings of a DMD run. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fewstep.core.config import RunConfig
from fewstep.core.settings import DataConfig, FakeScoreConfig, StudentConfig, TeacherConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What the student minimises."""

    objective: Literal["dmd", "sid", "f_distill"] = "dmd"
    """'dmd' (reverse KL), 'sid' (score identity) or 'f_distill' (reweighted by a density ratio; needs the GAN)."""
    divergence: Literal["rkl", "kl", "js", "softened_rkl", "neyman", "squared_hellinger", "jeffreys"] = "js"
    """Divergence of f_distill."""
    sid_alpha: float = 1.0
    """Alpha of SiD."""
    score_shift: float = 1.0
    """Time shift of the times at which the scores are compared."""
    fake_shift: float = 1.0
    """Time shift of the times at which the fake score is trained."""
    t_min: float = 0.02
    """Smallest time at which the scores are compared and the fake score is trained."""
    t_max: float = 0.98
    """Largest such time."""
    gan_weight: float = 0.0
    """Weight of the student's adversarial loss; 0 turns the discriminator off. Needs data.latents."""
    discriminator_weight: float = 0.01
    """Weight of the discriminator loss beside the fake-score loss."""
    regression_weight: float = 0.0
    """Weight of the regression on teacher pairs (DMD1); needs data.pairs and a one-step student."""

    @property
    def interval(self) -> tuple[float, float]:
        """(t_min, t_max)."""
        return self.t_min, self.t_max


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    """Distribution matching distillation (DMD2, arXiv:2405.14867) of a teacher into a few-step student."""

    teacher: TeacherConfig
    """The model to distil."""
    data: DataConfig
    """What the run reads."""
    run: RunConfig
    """Where and how long the run goes."""
    student: StudentConfig
    """The few-step generator."""
    fake_score: FakeScoreConfig
    """The network that follows the student's distribution."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What the student minimises."""
    method: Literal["dmd"] = "dmd"
    """Name of the method, kept with the export."""

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(config: DmdConfig) -> None:
    """Raise ValueError for settings that cannot work together, with what to change."""
    student, loss, data = config.student, config.loss, config.data
    if student.sampler == "flow_map":
        raise ValueError("student.sampler 'flow_map' needs a network of two times; use scripts/train_consistency.py")
    if student.steps < 1:
        raise ValueError(f"student.steps is {student.steps}; it must be at least 1")
    if config.fake_score.updates_per_student_update < 1:
        raise ValueError("fake_score.updates_per_student_update must be at least 1 (DMD2 uses 5)")
    if not 0.0 < loss.t_min < loss.t_max < 1.0:
        raise ValueError(f"loss.t_min {loss.t_min} and loss.t_max {loss.t_max} must satisfy 0 < t_min < t_max < 1")
    if loss.gan_weight > 0 and data.latents is None:
        raise ValueError("loss.gan_weight needs real data; set data.latents to a folder from scripts/encode_latents.py")
    if loss.objective == "f_distill" and loss.gan_weight == 0:
        raise ValueError("loss.objective f_distill reads density ratios off the discriminator; set loss.gan_weight > 0")
    if loss.regression_weight > 0 and (data.pairs is None or student.steps != 1):
        raise ValueError("loss.regression_weight needs data.pairs and student.steps 1 (DMD1 is a one-step method)")
