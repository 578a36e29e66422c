"""Settings of a DMD run. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from fewstep.core.config import RunConfig, require_one_method
from fewstep.core.run_settings import RunSettings
from fewstep.core.settings import (
    FakeScoreConfig,
    SampleDataConfig,
    SteppingStudentConfig,
    TeacherConfig,
    TimeLawConfig,
)


@dataclass(frozen=True, kw_only=True)
class DmdObjective:
    """Reverse KL (DMD, arXiv:2311.18828): nothing to set."""


@dataclass(frozen=True, kw_only=True)
class SidObjective:
    """Score identity distillation (arXiv:2404.04057)."""

    alpha: float = 1.0
    """Weight of the second part of its loss."""


@dataclass(frozen=True, kw_only=True)
class FDistillObjective:
    """DMD reweighted to another f-divergence (arXiv:2502.15681) by density ratios, which it reads off the GAN."""

    divergence: Literal["rkl", "kl", "js", "softened_rkl", "neyman", "squared_hellinger", "jeffreys"] = "js"
    """The divergence."""
    time_bins: int = 0
    """Divide density ratios by their mean in so many equal bins of time, of one batch over all processes; 0 does
    not."""

    def __post_init__(self) -> None:
        if self.time_bins < 0:
            raise ValueError(f"time_bins is {self.time_bins}; it must be 0 or more")
        if self.time_bins > 0 and self.divergence == "rkl":
            raise ValueError("time_bins with divergence 'rkl', whose weights are always one: leave it out")


MatchingObjective: TypeAlias = DmdObjective | SidObjective | FDistillObjective


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Where the scores of student and teacher are compared, and where the fake score is trained."""

    score_times: TimeLawConfig = field(default_factory=TimeLawConfig)
    """Times at which the scores are compared."""
    fake_times: TimeLawConfig = field(default_factory=TimeLawConfig)
    """Times at which the fake score is trained, and a discriminator on it."""
    guidance: float | None = None
    """Guidance of the real score, where it is another than teacher.guidance."""
    fake_error: Literal["velocity", "x0", "eps"] = "velocity"
    """What the fake score's squared error is of: DMD2 regresses x0 or eps, which weighs times by t^2 or (1 - t)^2."""

    def guidance_of(self, teacher: TeacherConfig) -> float:
        """The guidance of the real score."""
        return teacher.guidance if self.guidance is None else self.guidance


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """A discriminator on features of the fake score (DMD2)."""

    latents: str
    """Folder of real latents (scripts/encode_latents.py)."""
    weight: float
    """Weight of the student's adversarial loss."""
    discriminator_weight: float = 0.01
    """Weight of the discriminator loss beside the fake-score loss."""

    def __post_init__(self) -> None:
        if not self.weight > 0 or not self.discriminator_weight > 0:
            raise ValueError(
                f"weight {self.weight} and discriminator_weight {self.discriminator_weight} must be positive; "
                "leave the section out for no discriminator"
            )


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """Regression on teacher pairs (DMD1), for a one-step student."""

    pairs: str
    """Folder of teacher pairs (scripts/make_teacher_pairs.py)."""
    weight: float
    """Weight of the regression."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; it must be positive, leave the section out for no regression")


@dataclass(frozen=True, kw_only=True)
class DmdConfig:
    """Distribution matching distillation (DMD2, arXiv:2405.14867) of a teacher into a few-step student.

    One of the sections dmd, sid and f_distill is there, and is the method.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("dmd", "sid", "f_distill")

    teacher: TeacherConfig
    """The model to distil."""
    data: SampleDataConfig
    """What the run reads."""
    run: RunConfig
    """Where and how long the run goes."""
    student: SteppingStudentConfig
    """The few-step generator."""
    fake_score: FakeScoreConfig
    """The network that follows the student's distribution."""
    dmd: DmdObjective | None = None
    """Minimise the reverse KL."""
    sid: SidObjective | None = None
    """Minimise SiD's score identity."""
    f_distill: FDistillObjective | None = None
    """Minimise another divergence; needs the section gan."""
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    """Times of the scores."""
    gan: GanConfig | None = None
    """An adversarial loss beside it; leave it out for none."""
    regression: RegressionConfig | None = None
    """A regression beside it; leave it out for none."""

    def __post_init__(self) -> None:
        require_one_method(self)
        if self.f_distill is not None and self.gan is None:
            raise ValueError("f_distill reads density ratios off the discriminator; give the section gan")
        if self.regression is not None and self.student.steps != 1:
            raise ValueError(
                f"regression with student.steps {self.student.steps}: DMD1 is a one-step method; set it to 1"
            )

    @property
    def objective(self) -> MatchingObjective:
        """The section that is there."""
        objective = self.dmd or self.sid or self.f_distill
        assert objective is not None
        return objective

    @property
    def method(self) -> str:
        """Name of the method, kept with the export."""
        return require_one_method(self)

    @property
    def student_settings(self) -> RunSettings:
        """What an export must know of the student."""
        return RunSettings(
            method=self.method,
            **self.teacher.of_run(),
            student_path=self.student.path,
            steps=self.student.steps,
            shift=self.student.shift,
            times=self.student.times,
            timesteps=self.student.timesteps,
            sampler=self.student.sampler,
            lora_rank=self.student.lora_rank,
            lora_alpha=self.student.lora_alpha,
            lora_targets=self.student.lora_targets,
            height=self.data.height,
            width=self.data.width,
            frames=self.data.frames,
        )
