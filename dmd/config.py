"""Settings of a DMD run. No torch here, so that `--help` is quick."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar

from fewstep.core.config import OptimizerConfig, RunConfig, require_one_method
from fewstep.core.run_settings import RunSettings
from fewstep.core.settings import (
    SampleDataConfig,
    SteppingStudentConfig,
    TeacherConfig,
    TimeLawConfig,
    ToldFakeScoreConfig,
)
from fewstep.evaluation.scorers.settings import ScorerListConfig
from fewstep.evaluation.validation import ValidationConfig


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
    guidance_spread: float = 0.0
    """Guidance is drawn for each sample, evenly from so much below to so much above (DMDR: 0.5)."""
    fake_error: Literal["velocity", "x0", "eps"] = "velocity"
    """What the fake score's squared error is of: DMD2 regresses x0 or eps, which weighs times by t^2 or (1 - t)^2."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_spread < math.inf:
            raise ValueError(f"guidance_spread is {self.guidance_spread}; it must be 0 or more")

    def guidance_of(self, teacher: TeacherConfig) -> float:
        """The guidance of the real score, and the middle of what is drawn."""
        return teacher.guidance if self.guidance is None else self.guidance

    @property
    def anneals(self) -> bool:
        """Whether a law of times changes during the run."""
        return self.score_times.anneal_steps > 0 or self.fake_times.anneal_steps > 0


class HasMatching(Protocol):
    """Settings of a run that may compare scores."""

    @property
    def matching(self) -> MatchingConfig | None: ...


ConfigT = TypeVar("ConfigT", bound=HasMatching)


def matching_at(config: ConfigT, updates: int) -> ConfigT:
    """The settings with the laws of times as they are after so many updates of the student."""
    matching = config.matching
    if matching is None or not matching.anneals:
        return config
    laws = {"score_times": matching.score_times.at(updates), "fake_times": matching.fake_times.at(updates)}
    changed: Any = dataclasses.replace(matching, **laws)
    # The settings have been checked as a whole; a copy with other laws needs it no second time.
    now = copy.copy(config)
    object.__setattr__(now, "matching", changed)
    return now


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """A discriminator on features of the fake score (DMD2)."""

    latents: str
    """Folder of real latents (scripts/encode_latents.py)."""
    weight: float
    """Weight of the student's adversarial loss."""
    features: Literal["fake_score", "teacher"] = "fake_score"
    """Whose features are judged: those of the fake score, whose trunk the discriminator trains, too (DMD2), or those of
    the frozen teacher."""
    blocks: tuple[int, ...] = ()
    """Transformer blocks whose features are judged; empty is the family's own choice."""
    head: Literal["mlp", "conv", "multiscale"] = "mlp"
    """Two layers on each position, DMD2's convolutions on the feature map (pictures), or FastGen's at several scales
    (videos), each block's judged by itself."""
    head_width: int | None = None
    """Width of the layers of an mlp head (empty is 128), or of the last one at several scales (1024)."""
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Scales at which a multiscale head reads its features, in latent frames and pixels."""
    dropout: float = 0.0
    """Share of the last layer's numbers that a multiscale head leaves out while it is trained."""
    loss: Literal["softplus", "hinge"] = "softplus"
    """Non-saturating logistic loss (DMD2), or hinge."""
    r1_weight: float = 0.0
    """Weight of the slope of the logits at real latents, by differences (APT); 0 takes none."""
    r1_scale: float = 0.1
    """Deviation of the noise by which real latents are moved for it."""
    same_noise: bool = False
    """Fakes and reals share time and noise (FastGen)."""
    discriminator_weight: float = 0.01
    """Weight of the discriminator loss beside the fake-score loss, for features of the fake score."""
    optimizer: OptimizerConfig | None = None
    """Optimizer of the heads on the teacher's features; those on the fake score's are trained with it."""

    def __post_init__(self) -> None:
        if not self.weight > 0 or not self.discriminator_weight > 0:
            raise ValueError(
                f"weight {self.weight} and discriminator_weight {self.discriminator_weight} must be positive; "
                "leave the section out for no discriminator"
            )
        if not 0 <= self.r1_weight < math.inf or not 0 < self.r1_scale < math.inf or (self.head_width or 1) < 1:
            raise ValueError(
                f"r1_weight {self.r1_weight} must be 0 or more, r1_scale {self.r1_scale} and head_width "
                f"{self.head_width} positive"
            )
        if not self.scales or min(self.scales) < 1 or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales is {list(self.scales)}; give distinct whole numbers from 1 on")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        on_teacher = self.features == "teacher"
        if on_teacher != (self.optimizer is not None):
            raise ValueError(
                f"features is {self.features} and optimizer {'given' if self.optimizer else 'empty'}: heads on the "
                "teacher's features need one, those on the fake score's are trained by its own"
            )
        unread = {
            "discriminator_weight": on_teacher,
            "head_width": self.head == "conv",
            "scales": self.head != "multiscale",
            "dropout": self.head != "multiscale" or not on_teacher,
            "r1_scale": self.r1_weight == 0,
        }
        for name, given in unread.items():
            if given and getattr(self, name) != getattr(GanConfig, name):
                raise ValueError(f"{name} is {getattr(self, name)}, which nothing reads here: leave it out")

    @property
    def width(self) -> int:
        """The width of a head's layers."""
        return self.head_width or (1024 if self.head == "multiscale" else 128)

    @property
    def chosen_blocks(self) -> tuple[int, ...] | None:
        """The blocks, None for the family's own."""
        return self.blocks or None


@dataclass(frozen=True, kw_only=True)
class NoisedDataConfig:
    """The student's input is whole samples, noised to one of its times, in place of its own rollout: real data
    (FastGen, FastWan), or what its own sampler makes, on which the fake score learns, too (DMDR)."""

    latents: str | None = None
    """Folder of real latents with captions (scripts/encode_latents.py, encode_videos.py); empty is the student's own
    samples."""
    share: float = 1.0
    """Share of the steps with such an input; the others roll out (SenseFlow mixes)."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; it must lie in (0, 1], leave the section out for rollouts alone")


@dataclass(frozen=True, kw_only=True)
class BlendedRealConfig:
    """A share of the fake score's adapters in the real score, falling to none by half a cosine (DMDR)."""

    share: float
    """Of the scale that the adapters have in the fake score."""
    steps: int
    """Updates of the student until none is left."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.steps < 1:
            raise ValueError(f"share is {self.share} and steps {self.steps}; they must lie in (0, 1], and from 1 on")


@dataclass(frozen=True, kw_only=True)
class ReflConfig(ScorerListConfig):
    """The gradient of a reward on the student's samples (ReFL, as DMDR has it after its cold start)."""

    margin: float | None = None
    """Of the hinge relu(margin - reward) of each scorer; empty is none, minus the reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin is {self.margin}; give a number, or leave it out for minus the reward")


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
class DmdFakeScoreConfig(ToldFakeScoreConfig):
    """The network that follows the student's distribution."""

    student_share: float = 0.0
    """Share of the way to the student that the fake score goes after each update of the student (implicit distribution
    alignment of SenseFlow, arXiv:2506.00523, there 0.02 or 0.03); both train all weights of one network then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.student_share < 1:
            raise ValueError(f"student_share is {self.student_share}; it must lie in [0, 1)")


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
    fake_score: DmdFakeScoreConfig
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
    blended_real: BlendedRealConfig | None = None
    """The fake score's adapters in the real score for a while; leave it out for none."""
    regression: RegressionConfig | None = None
    """A regression beside it; leave it out for none."""
    refl: ReflConfig | None = None
    """The gradient of a reward beside it; leave it out for none."""
    noised_data: NoisedDataConfig | None = None
    """Noised real data as the student's input; leave it out for backward simulation (DMD2)."""
    validation: ValidationConfig | None = None
    """Measures while it trains, and the best weights kept; leave it out for none."""

    def __post_init__(self) -> None:
        require_one_method(self)
        if self.f_distill is not None and self.gan is not None and self.gan.loss == "hinge":
            raise ValueError("f_distill with gan.loss 'hinge', whose logits are no density ratios: use 'softplus'")
        if self.f_distill is not None and self.gan is None:
            raise ValueError("f_distill reads density ratios off the discriminator; give the section gan")
        check_shared_weights(self)
        check_told_exit(self)
        apart = self.fake_score.path is not None or self.teacher.lora_apart
        if self.blended_real is not None and (self.fake_score.lora_rank == 0 or apart):
            raise ValueError(
                "blended_real puts the fake score's adapters into the teacher: set fake_score.lora_rank, and leave "
                "fake_score.path and teacher.lora_apart out"
            )
        if self.noised_data is not None and self.regression is not None:
            raise ValueError("noised_data with regression, which is on the student's own noise: leave one of them out")
        if self.regression is not None and self.student.steps != 1:
            raise ValueError(
                f"regression with student.steps {self.student.steps}: DMD1 is a one-step method; set it to 1"
            )

    @property
    def told_exits(self) -> int:
        """How many exits of the student the fake score is told apart; 0 for none."""
        times = self.student.times or self.student.timesteps
        return (len(times) if times else self.student.steps) if self.fake_score.told_exit else 0

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


def check_shared_weights(config: DmdConfig) -> None:
    """Raise ValueError where the fake score is to move towards a student that trains other weights."""
    student, fake = config.student, config.fake_score
    if fake.student_share == 0:
        return
    if student.lora_rank > 0 or fake.lora_rank > 0:
        raise ValueError(
            f"fake_score.student_share is {fake.student_share} with adapters (lora_rank {student.lora_rank} and "
            f"{fake.lora_rank}): half-way between two pairs of factors is not half-way between their products; train "
            "all weights"
        )
    if student.path != fake.path:
        raise ValueError(
            f"fake_score.student_share is {fake.student_share}, and path is {student.path} for the student and "
            f"{fake.path} for the fake score: it moves between the weights of one network alone"
        )


def check_told_exit(config: DmdConfig) -> None:
    """Raise ValueError where a fake score is to be told the exit, and there is one alone, or more than a number."""
    if not config.fake_score.told_exit:
        return
    if config.told_exits < 2:
        raise ValueError("fake_score.told_exit with a student of one step, whose samples all stop there: leave it out")
    noised = config.noised_data
    if noised is not None and (noised.latents is None or noised.share < 1):
        raise ValueError(
            "fake_score.told_exit with noised_data of the student's own samples, or in a share of the steps: samples "
            "of a step would then be of two kinds; give noised_data.latents and a share of 1, or leave it out"
        )
    if config.blended_real is not None:
        raise ValueError("fake_score.told_exit with blended_real, whose real score is told nothing: leave one out")
