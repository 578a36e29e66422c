"""Settings of a run that trains a causal video student. No torch here, so that `--help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.stages.sections import (
    AsdConfig,
    CausalDataConfig,
    CausalStudentConfig,
    DiffusionForcingConfig,
    FlowConfig,
    OdeConfig,
    RedmdConfig,
    SelfForcingConfig,
    TeacherForcingConfig,
    TfAnyflowConfig,
    TfDcmConfig,
    TfMeanflowConfig,
    TfScmConfig,
    require_default,
)
from fewstep.core.config import RunConfig, require_one_method
from fewstep.core.settings import TeacherConfig, ToldFakeScoreConfig
from fewstep.dmd.config import DmdObjective, GanConfig, MatchingConfig, SidObjective

# Stages of two times; those whose batches are noised videos, and all stages.
FlowMapStage: TypeAlias = TfMeanflowConfig | TfAnyflowConfig
VideoStage: TypeAlias = TeacherForcingConfig | DiffusionForcingConfig | TfDcmConfig | TfScmConfig | FlowMapStage
Stage: TypeAlias = VideoStage | OdeConfig | SelfForcingConfig
# Sections that are there beside self_forcing alone, those that it needs first.
NEEDED_SCORES = ("fake_score", "matching")
SCORE_SECTIONS = (*NEEDED_SCORES, "sid", "asd", "redmd", "gan", "joint")


@dataclass(frozen=True, kw_only=True)
class CausalTeacherConfig:
    """The causal network of many steps whose path a consistency stage follows, where it is not the student's start."""

    weights: str
    """Its weights, such as the run of a teacher_forcing stage."""
    path: str | None = None
    """Model whose network it is, of the teacher's latent space, such as one of 14B for a student of 1.3B; empty is that
    of the student."""
    guidance: float | None = None
    """Its guidance; empty is teacher.guidance."""

    def __post_init__(self) -> None:
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be finite, such as 3.0, or left out")


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Consistency on clean context in the student's steps of self-forcing (Causal-rCM's joint stage).

    One of the sections tf_scm and tf_dcm is there. How the two losses weigh is ours: what was read names the stage.
    """

    weight: float = 1.0
    """Of the consistency loss beside that of the rollouts."""
    tf_scm: TfScmConfig | None = None
    """Continuous-time consistency."""
    tf_dcm: TfDcmConfig | None = None
    """Discrete consistency."""

    def __post_init__(self) -> None:
        if (self.tf_scm is None) == (self.tf_dcm is None):
            raise ValueError("joint takes one of the sections tf_scm and tf_dcm; give {} for its defaults")
        if not 0 < self.weight < math.inf:
            raise ValueError(
                f"weight is {self.weight}; it must be above 0 and finite, and without the section it is none"
            )
        if self.tf_scm is not None and self.tf_scm.time_smoothing > 0:
            raise ValueError(
                f"joint.tf_scm.time_smoothing is {self.tf_scm.time_smoothing}: a student of a tf_scm run has it in its "
                "weights already; leave it out, and start from such a run (student.init)"
            )

    @property
    def stage(self) -> TfScmConfig | TfDcmConfig:
        """The section that is there."""
        stage = self.tf_scm if self.tf_scm is not None else self.tf_dcm
        assert stage is not None
        return stage


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """A stage on the way from a bidirectional teacher to a causal student of a few steps per chunk.

    One of the sections of `METHODS` is there, and is the stage.
    """

    METHODS: ClassVar[tuple[str, ...]] = (
        "teacher_forcing",
        "diffusion_forcing",
        "tf_dcm",
        "tf_scm",
        "tf_meanflow",
        "tf_anyflow",
        "ode",
        "self_forcing",
    )

    teacher: TeacherConfig
    """The bidirectional video model; in tf_dcm and tf_scm its guidance is that of the causal teacher."""
    data: CausalDataConfig
    """What the run reads."""
    run: RunConfig
    """Where and how long the run goes."""
    student: CausalStudentConfig
    """The causal generator."""
    teacher_forcing: TeacherForcingConfig | None = None
    """Flow matching on clean context."""
    diffusion_forcing: DiffusionForcingConfig | None = None
    """Flow matching on noisy context."""
    tf_dcm: TfDcmConfig | None = None
    """Discrete consistency on clean context."""
    tf_scm: TfScmConfig | None = None
    """Continuous-time consistency on clean context."""
    tf_meanflow: TfMeanflowConfig | None = None
    """MeanFlow on clean context; needs student.second_time."""
    tf_anyflow: TfAnyflowConfig | None = None
    """AnyFlow on clean context; needs student.second_time."""
    ode: OdeConfig | None = None
    """Regression on trajectories."""
    self_forcing: SelfForcingConfig | None = None
    """Distribution matching on rollouts; needs fake_score and matching."""
    fake_score: ToldFakeScoreConfig | None = None
    """The bidirectional network that follows the student's distribution, beside self_forcing."""
    matching: MatchingConfig | None = None
    """Times of the scores, beside self_forcing."""
    sid: SidObjective | None = None
    """SiD's score identity in place of the reverse KL, beside self_forcing."""
    asd: AsdConfig | None = None
    """Adversarial self-distillation, beside self_forcing; leave it out for none."""
    redmd: RedmdConfig | None = None
    """Rollouts weigh by a reward, beside self_forcing; leave it out for none."""
    gan: GanConfig | None = None
    """A discriminator on the fake score's features of rollouts and real videos, beside self_forcing; leave it out for
    none."""
    joint: JointConfig | None = None
    """Consistency on data.latents in the student's steps of self-forcing; needs causal_teacher."""
    causal_teacher: CausalTeacherConfig | None = None
    """The causal teacher of joint, tf_dcm, tf_scm, tf_meanflow, tf_anyflow and ode of source 'causal'; left out, these
    stages take the weights that the student starts from."""

    def __post_init__(self) -> None:
        require_one_method(self)
        check_start(self)
        check_second_time(self)
        check_videos(self)
        check_controls(self)
        check_scores(self)

    @property
    def method(self) -> str:
        """Name of the stage, kept with the export."""
        return require_one_method(self)

    @property
    def stage(self) -> Stage:
        """The section that is there."""
        return getattr(self, self.method)

    @property
    def is_flow(self) -> bool:
        """Whether the student takes many steps of an ODE with guidance; others take those of their schedule."""
        return isinstance(self.stage, FlowConfig)

    @property
    def has_causal_teacher(self) -> bool:
        """Whether the weights that the stage starts from are its teacher, too."""
        stage = self.stage
        if isinstance(stage, FlowMapStage):
            return stage.velocity == "teacher"
        return isinstance(stage, TfDcmConfig | TfScmConfig) or (
            isinstance(stage, OdeConfig) and stage.source == "causal"
        )

    @property
    def time_smoothing(self) -> float:
        """Of the student's time before training, where its tangent follows a path."""
        stage = self.stage
        return stage.time_smoothing if isinstance(stage, TfScmConfig | FlowMapStage) else 0.0

    @property
    def reads_videos(self) -> bool:
        """Whether there is a use for data.latents."""
        if isinstance(self.stage, OdeConfig):
            return self.stage.makes_causal_pairs
        on_data = isinstance(self.stage, SelfForcingConfig) and self.stage.input == "noised_data"
        on_data = on_data or self.joint is not None
        return (
            on_data or isinstance(self.stage, VideoStage) or self.data.image_share > 0 or self.data.controls is not None
        )

    @property
    def consistency(self) -> TfScmConfig | TfDcmConfig | None:
        """The section of consistency on clean context, as the stage or in the joint one."""
        return self.joint.stage if self.joint is not None else self.tf_scm if self.tf_scm is not None else self.tf_dcm

    @property
    def told_exits(self) -> int:
        """How many exits of the student the fake score is told apart; 0 for none."""
        if self.fake_score is None or self.self_forcing is None or not self.fake_score.told_exit:
            return 0
        schedules = self.self_forcing.rollout_schedules
        return sum(map(max, schedules)) if schedules else self.student.longest_steps

    @property
    def objective(self) -> DmdObjective | SidObjective:
        """How self-forcing compares the scores."""
        return DmdObjective() if self.sid is None else self.sid


def check_second_time(config: CausalConfig) -> None:
    """Raise ValueError for a flow map with one time, and for a second one that the stage would not train."""
    kind, stage = config.student.second_time, config.stage
    if isinstance(stage, FlowMapStage) and kind == "none":
        raise ValueError(
            f"{config.method} trains a network that is told where a step ends, and student.second_time is 'none': set "
            "it to 'sum' (MeanFlow) or 'gate' (AnyFlow)"
        )
    if not isinstance(stage, FlowMapStage | SelfForcingConfig) and kind != "none":
        raise ValueError(
            f"student.second_time is {kind!r}, which {config.method} does not train: leave it out; it belongs to "
            "tf_meanflow, tf_anyflow and self_forcing"
        )
    if kind != "none" and config.data.controls is not None:
        raise ValueError(
            f"data.controls with student.second_time {kind!r}: flow maps are exported as diffusers' causal class, "
            "which takes text alone; leave one out"
        )
    if kind != "none" and config.joint is not None:
        raise ValueError(
            f"joint with student.second_time {kind!r}: its consistency is that of networks of one time; leave one out"
        )


def check_start(config: CausalConfig) -> None:
    """Raise ValueError for a stage without the weights it goes on from, or with steps that it has no use for."""
    if config.causal_teacher is None and config.joint is not None and config.self_forcing is not None:
        raise ValueError(
            "joint needs the section causal_teacher: give the run of a teacher_forcing stage as its weights"
        )
    if config.causal_teacher is not None and config.joint is None and not config.has_causal_teacher:
        raise ValueError(f"causal_teacher, and {config.method} follows none here: leave the section out")
    if config.time_smoothing > 0 and config.student.lora_rank > 0:
        raise ValueError(
            f"{config.method}.time_smoothing is {config.time_smoothing} with student.lora_rank "
            f"{config.student.lora_rank}: the layers of the time are shared with the causal teacher there; set "
            f"{config.method}.tangent to 'central' and central_step to 0.02, or train all weights"
        )
    section = config.consistency
    if section is not None and section.noisy_context:
        name = "tf_scm" if isinstance(section, TfScmConfig) else "tf_dcm"
        if config.student.policy.noisy_from is None or section.context_noise > 0:
            raise ValueError(
                f"{name}.noisy_context with student.policy.noisy_from {config.student.policy.noisy_from} and "
                f"context_noise {section.context_noise}: it follows the policy, so give noisy_from (Causal-rCM: 1), "
                "and leave context_noise out"
            )
    if config.has_causal_teacher and config.student.init is None:
        raise ValueError(
            f"{config.method} distils a causal teacher, and student.init is empty: give the run directory of a "
            "teacher_forcing stage; the bidirectional teacher's weights know no causal mask"
        )
    if config.is_flow:
        for name in ("steps", "times"):
            try:
                require_default(config.student, name, f"{config.method} trains a flow, which has no schedule of steps")
            except ValueError as error:
                raise ValueError(f"student.{error}") from error


def check_videos(config: CausalConfig) -> None:
    """Raise ValueError where the stage lacks videos, or is given some that it would not read."""
    data, stage = config.data, config.stage
    if isinstance(stage, OdeConfig) and data.image_share > 0:
        raise ValueError("data.image_share is no part of ode: its chunks at t = 0 are given as a whole")
    if config.reads_videos and data.latents is None:
        raise ValueError(
            f"data.latents is empty; {config.method} with image_share {data.image_share} needs videos: a folder from "
            "scripts/encode_videos.py"
        )
    if data.latents is not None and not config.reads_videos and data.controls is None:
        reason = "self_forcing reads videos for data.image_share and data.controls, and there is neither"
        if isinstance(stage, OdeConfig):
            reason = "ode reads videos to make trajectories of source 'causal', and makes none here"
        raise ValueError(
            f"data.latents is {data.latents!r}, and {reason}: leave it out (data.height and width say a size)"
        )


def check_controls(config: CausalConfig) -> None:
    """Raise ValueError where a stage cannot be given something for each frame."""
    stage, has_controls = config.stage, config.data.controls is not None
    if isinstance(stage, SelfForcingConfig) and not has_controls and stage.steered_teacher is not None:
        raise ValueError("self_forcing.steered_teacher without data.controls: leave it out")
    place, dropped = config.student.controls_in, isinstance(stage, FlowConfig) and stage.control_drop > 0
    if not has_controls and (place != "channels" or dropped):
        raise ValueError(f"student.controls_in {place!r} or control_drop without data.controls: leave it out")
    if not has_controls:
        return
    if place == "layers" and (config.asd is not None or config.gan is not None):
        raise ValueError(
            "student.controls_in 'layers' with asd or gan, which read features of the stock call: leave them out"
        )
    if isinstance(stage, OdeConfig):
        raise ValueError("data.controls is no part of ode, whose trajectories have none: go on with tf_dcm or tf_scm")
    if isinstance(stage, SelfForcingConfig):
        if stage.steered_teacher is None:
            raise ValueError(
                "self_forcing with data.controls, and self_forcing.steered_teacher is empty: the bidirectional teacher "
                "knows no controls, and its scores would pull the student to videos that ignore them. Train one with "
                "them (diffusion_forcing, a layout of one chunk), and give its run"
            )
        if config.teacher.lora_apart:
            raise ValueError(
                "teacher.lora_apart with self_forcing.steered_teacher, which takes the teacher's place: leave "
                "teacher.lora and lora_apart out"
            )
        if stage.longest_frames is not None:
            raise ValueError("self_forcing.longest_frames with data.controls: controls end where their videos do")
    if config.fake_score is not None and config.fake_score.path is not None:
        raise ValueError(
            f"fake_score.path {config.fake_score.path} with data.controls, which only the steered teacher's network "
            "knows: leave fake_score.path out"
        )
    if config.student.lora_rank > 0 and config.student.init is None and place == "channels":
        raise ValueError(
            "student.lora_rank with data.controls and without student.init: adapters would leave the new input "
            "channels at zero. Train all weights in the first stage, or start from weights that know the controls"
        )


def check_scores(config: CausalConfig) -> None:
    """Raise ValueError for scores beside a stage without rollouts, and for rollouts that cannot be compared."""
    there = [name for name in SCORE_SECTIONS if getattr(config, name) is not None]
    stage, student, fake_score = config.stage, config.student, config.fake_score
    if not isinstance(stage, SelfForcingConfig):
        if there:
            raise ValueError(
                f"the section {there[0]} belongs to self_forcing, and the method of this run is {config.method}, which "
                "would not read it: leave it out"
            )
        return
    lacking = [name for name in NEEDED_SCORES if name not in there]
    if lacking or fake_score is None:
        raise ValueError(f"self_forcing needs the section {' and '.join(lacking)} (matching: {{}} for its defaults)")
    if stage.scores == "causal" and (config.asd is not None or config.sid is not None or config.data.image_share > 0):
        raise ValueError(
            "self_forcing.scores 'causal' with asd, sid or data.image_share, which know bidirectional scores alone: "
            "leave them out"
        )
    if config.redmd is not None and config.sid is not None:
        raise ValueError("redmd weighs the reverse KL, and sid takes its place: leave one of them out")
    if config.gan is not None:
        check_gan(config, config.gan, stage)
    if config.joint is not None and config.data.controls is not None:
        raise ValueError("joint with data.controls: its causal teacher knows none; leave one of them out")
    if stage.input == "noised_data" and (config.data.image_share > 0 or config.asd is not None):
        raise ValueError(
            "self_forcing.input 'noised_data' with data.image_share or asd, which belong to rollouts: leave them out"
        )
    if stage.rollout_schedules and student.times is not None:
        raise ValueError("self_forcing.rollout_schedules count steps on grids; leave student.times out")
    if fake_score.told_exit and (stage.input != "rollout" or (stage.exit == "last" and not stage.rollout_schedules)):
        raise ValueError(
            f"fake_score.told_exit with self_forcing.input {stage.input!r} and exit {stage.exit!r}: chunks of a video "
            "have steps of their own there, or all rollouts stop at the last; leave it out"
        )
    if fake_score.told_exit and config.told_exits < 2:
        raise ValueError("fake_score.told_exit with rollouts of one step, which all stop there: leave it out")
    if config.asd is not None and max([student.longest_steps, *map(max, stage.rollout_schedules)]) < 2:
        raise ValueError("asd compares n with n + 1 steps, and no chunk has two: raise student.steps")
    layout = ChunkLayout(student.layout)
    if stage.longest_frames is not None:
        layout.require_longer(stage.longest_frames, stage.learning_frames(layout))


def check_gan(config: CausalConfig, gan: GanConfig, stage: SelfForcingConfig) -> None:
    """Raise ValueError for a discriminator that has no features, or no real videos of its kind."""
    if gan.features != "fake_score":
        raise ValueError(
            f"gan.features is {gan.features!r}; beside self_forcing the discriminator is on the fake score's features"
        )
    if gan.head == "conv":
        raise ValueError("gan.head 'conv' reads features as pictures: use 'mlp' or 'multiscale' for videos")
    beside = {"asd": config.asd is not None, "data.controls": config.data.controls is not None}
    beside |= {"self_forcing.scores 'causal'": stage.scores == "causal"}
    wrong = [name for name, there in beside.items() if there]
    if wrong:
        raise ValueError(f"gan with {wrong[0]}, whose features or conditions it does not know: leave one of them out")
