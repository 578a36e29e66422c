"""Settings of a consistency run. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from fewstep.consistency.mcm.config import McmConfig
from fewstep.consistency.sana_sprint.config import SprintConfig
from fewstep.consistency.sections import (
    AlphaflowConfig,
    AnyflowConfig,
    DcmConfig,
    DmfConfig,
    EctConfig,
    ImfConfig,
    MeanflowConfig,
    PairsConfig,
    ScmConfig,
    TangentConfig,
    require_unset,
)
from fewstep.core.config import RunConfig, require_one_method
from fewstep.core.run_settings import RunSettings
from fewstep.core.settings import FakeScoreConfig, GridStudentConfig, SampleDataConfig, TeacherConfig
from fewstep.dmd.config import MatchingConfig
from fewstep.evaluation.validation import ValidationConfig

FlowMapSettings: TypeAlias = MeanflowConfig | ImfConfig | AlphaflowConfig | DmfConfig | AnyflowConfig
MethodSettings: TypeAlias = ScmConfig | DcmConfig | EctConfig | PairsConfig | FlowMapSettings | SprintConfig | McmConfig


@dataclass(frozen=True, kw_only=True)
class ConsistencyDataConfig(SampleDataConfig):
    """What a consistency run reads."""

    latents: str
    """Folder of the latents that are noised (scripts/encode_latents.py, or encode_videos.py)."""


@dataclass(frozen=True, kw_only=True)
class ConsistencyMatchingConfig(MatchingConfig):
    """Distribution matching beside a consistency loss: rCM with scm or dcm, the second stage of anyflow."""

    weight: float
    """Weight lambda of distribution matching beside the consistency loss (rCM: 0.01)."""
    start: int = 0
    """Steps before distribution matching begins."""
    rollout: Literal["grid", "drawn"] = "grid"
    """Rollouts of the student on its grid with a random exit, or as rCM's: 1, 2, ... student.steps calls in turn,
    student and fake score each counting their own, at times of each sample that fall at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ValueError(f"weight: given {self.weight}, allowed is a number > 0; leave the section out for none")
        if self.start < 0:
            raise ValueError(f"start: given {self.start}, allowed is an integer >= 0")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency distillation of a teacher into a few-step student, alone or with distribution matching.

    One of the sections scm, dcm, ect, meanflow, imf, alphaflow, dmf, anyflow, sana_sprint, mcm and pairs is there, and
    is the method. `matching` beside scm or dcm is rCM.
    """

    METHODS: ClassVar[tuple[str, ...]] = (
        "scm", "dcm", "ect", "meanflow", "imf", "alphaflow", "dmf", "anyflow", "sana_sprint", "mcm", "pairs",
    )  # fmt: skip

    teacher: TeacherConfig
    """The model to distil; its guidance is also the one that sample grids and exports give a student of sana_sprint."""
    data: ConsistencyDataConfig
    """What the run reads."""
    run: RunConfig
    """Where and how long the run goes."""
    student: GridStudentConfig
    """The few-step generator."""
    scm: ScmConfig | None = None
    """Continuous-time consistency: follow the derivative along the teacher's path."""
    dcm: DcmConfig | None = None
    """Discrete consistency: follow one step of the teacher."""
    ect: EctConfig | None = None
    """Consistency without a teacher: follow one step of the noise."""
    meanflow: MeanflowConfig | None = None
    """Average velocities between two times."""
    imf: ImfConfig | None = None
    """Improved MeanFlow."""
    alphaflow: AlphaflowConfig | None = None
    """A schedule towards MeanFlow."""
    dmf: DmfConfig | None = None
    """Decoupled MeanFlow."""
    anyflow: AnyflowConfig | None = None
    """A flow map for any number of steps."""
    sana_sprint: SprintConfig | None = None
    """scm and a discriminator, for SANA."""
    mcm: McmConfig | None = None
    """dcm of motion and a discriminator of frames, for teachers of videos."""
    pairs: PairsConfig | None = None
    """Regression on the teacher's samples of given noise."""
    validation: ValidationConfig | None = None
    """Measures while it trains, and the best weights kept; leave it out for none."""
    matching: ConsistencyMatchingConfig | None = None
    """Distribution matching beside scm, dcm or anyflow; needs the section fake_score."""
    fake_score: FakeScoreConfig | None = None
    """The network that follows the student's distribution; needs the section matching."""

    def __post_init__(self) -> None:
        require_one_method(self)
        check_matching(self)
        check_sprint(self)
        check_guidance(self)
        check_smoothing(self)
        mcm, precision = self.mcm, self.run.mixed_precision
        if mcm is not None and mcm.motion == "learned" and precision == "fp16":
            raise ValueError(
                "mcm.motion 'learned' with run.mixed_precision 'fp16': student and motion head have one backward pass "
                "and two optimizers, between which fp16 would change the loss scale; use 'bf16' or 'no'"
            )

    @property
    def settings(self) -> MethodSettings:
        """The section that is there."""
        return getattr(self, require_one_method(self))

    @property
    def method(self) -> str:
        """Name of the method, kept with the export."""
        matched = self.matching is not None and self.anyflow is None
        return "rcm" if matched else require_one_method(self)

    @property
    def tangent(self) -> TangentConfig | None:
        """How the student is differentiated along a path; None for methods that take no derivative."""
        settings = self.settings.consistency if isinstance(self.settings, SprintConfig) else self.settings
        return settings if isinstance(settings, TangentConfig) else None

    @property
    def student_settings(self) -> RunSettings:
        """What an export must know of the student."""
        settings = self.settings
        is_flow_map = isinstance(settings, FlowMapSettings)
        return RunSettings(
            method=self.method,
            **self.teacher.of_run(),
            student_path=self.student.path,
            steps=self.student.steps,
            shift=self.student.shift,
            times=self.student.times,
            timesteps=self.student.timesteps,
            sampler="flow_map" if is_flow_map else "sde",
            lora_rank=self.student.lora_rank,
            lora_alpha=self.student.lora_alpha,
            lora_targets=self.student.lora_targets,
            height=self.data.height,
            width=self.data.width,
            frames=self.data.frames,
            second_time=settings.second_time if is_flow_map else "none",
            any_steps=self.pairs is None,
            guidance_embedded=isinstance(settings, SprintConfig),
            time_smoothing=0.0 if self.tangent is None else self.tangent.time_smoothing,
        )


def check_smoothing(config: ConsistencyConfig) -> None:
    """Raise ValueError where the student's time cannot be smoothed: under adapters, and where it is dense."""
    if config.tangent is None or config.tangent.time_smoothing == 0:
        return
    if config.student.lora_rank > 0:
        raise ValueError(
            f"time_smoothing is {config.tangent.time_smoothing} with student.lora_rank {config.student.lora_rank}: the "
            "layers of the time are shared with the teacher there; set tangent to 'central' and central_step to 0.02, "
            "or train all weights"
        )
    if config.sana_sprint is not None:
        raise ValueError(
            f"time_smoothing is {config.tangent.time_smoothing}, and students of sana_sprint are told a dense time, "
            "which is smooth: leave it out"
        )


def check_matching(config: ConsistencyConfig) -> None:
    """Raise ValueError where the method, distribution matching and the fake score do not fit together."""
    matching, fake_score = config.matching, config.fake_score
    if (matching is None) != (fake_score is None):
        there, lost = ("fake_score", "matching") if matching is None else ("matching", "fake_score")
        raise ValueError(f"the section {there} is given without {lost}, and each needs the other: add {lost}")
    if matching is None or fake_score is None:
        if config.anyflow is not None:
            require_unset(config.anyflow, ["rollout_steps"], "anyflow with the section matching")
        return
    if matching.rollout == "drawn" and config.anyflow is not None:
        raise ValueError("matching.rollout 'drawn' is rCM's, and anyflow has rollouts of its own: leave it out")
    if not isinstance(config.settings, ScmConfig | DcmConfig | AnyflowConfig):
        raise ValueError(
            f"the section matching beside {require_one_method(config)}: distribution matching goes with scm, dcm (both "
            "are rCM) or anyflow (its second stage); leave matching and fake_score out"
        )
    if config.scm is not None and config.scm.learned_weight:
        raise ValueError(
            "scm.learned_weight with the section matching: it would change the ratio of the two losses while it "
            "learns; set it to false"
        )


def check_sprint(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings that cannot work together with SANA-Sprint."""
    student, sprint = config.student, config.sana_sprint
    if sprint is None:
        return
    given_grid = student.times is not None or student.timesteps is not None
    if student.path is not None:
        raise ValueError(
            f"student.path is {student.path}, and sana_sprint makes its student of the teacher's own network: leave it "
            "out"
        )
    if student.lora_rank > 0 or student.shift != 1 or given_grid:
        raise ValueError(
            f"student.lora_rank is {student.lora_rank}, student.shift {student.shift}, student.times {student.times} "
            f"and student.timesteps {student.timesteps}; sana_sprint trains all weights and steps at the angles of its "
            "pipeline: set rank 0 and shift 1, and leave times out"
        )
    lowest, highest = min(sprint.guidance_scales), max(sprint.guidance_scales)
    if not lowest <= config.teacher.guidance <= highest:
        raise ValueError(
            f"teacher.guidance is {config.teacher.guidance}, which the student is given in samples and exports; it is "
            f"trained with sana_sprint.guidance_scales from {lowest} to {highest}: choose one between"
        )


def check_guidance(config: ConsistencyConfig) -> None:
    """Raise ValueError for settings of a guided velocity of the data where there is no guidance."""
    settings = config.settings
    if config.pairs is not None and (config.student.steps != 1 or config.teacher.guidance != 1):
        raise ValueError(
            f"student.steps is {config.student.steps} and teacher.guidance {config.teacher.guidance}: pairs trains one "
            "step, on samples whose guidance was chosen when they were made; set both to 1"
        )
    if config.ect is not None and config.teacher.guidance != 1:
        raise ValueError(f"teacher.guidance is {config.teacher.guidance}, and ect has no teacher to guide: set it to 1")
    if isinstance(settings, FlowMapSettings) and config.teacher.guidance == 1:
        require_unset(settings, settings.DATA_GUIDANCE, "velocity 'data' with a teacher.guidance other than 1")
