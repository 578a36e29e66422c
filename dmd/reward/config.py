"""Settings of a run that makes a few-step student better by a reward. No torch here, so that `--help` is quick.

The sections of the methods are in `sections`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fewstep.core.config import RunConfig, require_one_method
from fewstep.core.run_settings import RunSettings
from fewstep.core.settings import FakeScoreConfig, SampleDataConfig, SteppingStudentConfig, TeacherConfig
from fewstep.dmd.config import MatchingConfig
from fewstep.dmd.reward.sections import (
    CPS_ETA,
    ChainConfig,
    CrdConfig,
    EuphoniumConfig,
    FlashConfig,
    FlowGrpoConfig,
    GndmConfig,
    MethodConfig,
    NftConfig,
    RedmdConfig,
    RtdmdConfig,
    TransitionConfig,
    require_not_negative,
    require_positive,
)

# Runs of streams read it from here, too.
from fewstep.dmd.reward.sections import DecayConfig as DecayConfig
from fewstep.evaluation.scorers.settings import ScorerConfig as ScorerConfig
from fewstep.evaluation.scorers.settings import ScorerListConfig, read_scorer
from fewstep.evaluation.validation import ValidationConfig


@dataclass(frozen=True, kw_only=True)
class ScorersConfig(ScorerListConfig):
    """What is rewarded, and how samples of one prompt stand together."""

    group_size: int = 8
    """Samples per prompt that are compared with each other; divides run.batch_size. 1 in a run of cold start alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; a prompt needs a sample, and a comparison at least 2")


@dataclass(frozen=True, kw_only=True)
class RewardSettings(ScorersConfig):
    """What is rewarded, and how samples of one prompt are compared."""

    held_out: tuple[ScorerConfig, ...] = ()
    """Scorers that the training never follows, logged beside the reward; at least one of another architecture."""
    combination: Literal["sum", "gdpo"] = "sum"
    """'sum' adds the rewards, 'gdpo' normalises each in its groups first, which makes scales irrelevant."""
    scale: Literal["none", "leave_one_out", "group", "residual", "batch"] = "residual"
    """What centred rewards are divided by (docs/rewards.md)."""
    overlap: bool = True
    """Score in a background thread while the fake score and the snapshots are called."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "held_out", tuple(read_scorer(entry) for entry in self.held_out or ()))
        for entry in self.held_out:
            if (entry.weight, entry.mean, entry.std) != (1.0, 0.0, 1.0):
                raise ValueError(
                    f"held_out {entry.name} has weight {entry.weight}, mean {entry.mean}, std {entry.std}: held-out "
                    "scores are logged as they are; leave these out"
                )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is measured beside the reward, on fixed prompts and seeds."""

    every: int = 25
    """Steps between measurements."""
    prompts: int = 10
    """Number of prompts, the first of the file."""
    samples_per_prompt: int = 4
    """Seeds per prompt."""
    patience: int = 3
    """Measurements since a held-out score was best before a message says that it fell while the reward rose."""
    tolerance: float = 2.0
    """Standard errors over the monitored samples by which both must have moved to count."""

    def __post_init__(self) -> None:
        if min(self.every, self.prompts, self.samples_per_prompt, self.patience) < 1 or self.tolerance < 0:
            raise ValueError(f"{self}: all but tolerance must be at least 1, and tolerance not negative")
        if self.prompts * self.samples_per_prompt < 2:
            raise ValueError("monitor.prompts * samples_per_prompt is 1; a spread needs at least 2 samples")


@dataclass(frozen=True, kw_only=True)
class AmbientConfig:
    """Ambient matching (AC-DMD, RTDMD's first stage): scores are compared above the noise level of a step's end."""

    eta: float = CPS_ETA
    """Share of fresh noise in the step by which both scores lead back to that level."""
    consistency_weight: float = 0.0
    """Of the fake score's consistency regulariser (RTDMD 0.01)."""

    def __post_init__(self) -> None:
        require_not_negative(consistency_weight=self.consistency_weight)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; allowed is a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RewardMatchingConfig(MatchingConfig):
    """Distribution matching in a reward run; beside nft, crd, flow_grpo and euphonium an anchor that is not theirs."""

    weight: float = 1.0
    """Of the matching term."""
    steps: Literal["any", "last", "early"] = "any"
    """Which of the student's steps is matched: one drawn each time, the last, or one drawn of those at or above
    flash.pixel_gan.boundary, which leaves the others to the discriminator."""
    cold_start_steps: int = 0
    """Steps of matching alone before the reward comes in (RTDMD's first stage)."""
    ambient: AmbientConfig | None = None
    """Compare scores above the level at which a step ended; leave it out to compare them at the prediction x0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        laws = (self.score_times, self.fake_times)
        if self.anneals:
            raise ValueError("anneal_steps in a reward run, whose laws of times stay as they are: leave it out")
        if self.ambient is not None and any(law.unit == "timestep" or law.ends == "truncate" for law in laws):
            raise ValueError(
                "score_times or fake_times with unit timestep or ends truncate, and the section ambient draws between "
                "a step's end and 1: give times, clamped"
            )
        if self.ambient is not None and self.fake_error != "velocity":
            raise ValueError(
                f"fake_error is {self.fake_error!r} with the section ambient, whose fake score has an error of its "
                "own: leave one of them out"
            )
        require_positive(weight=self.weight)
        require_not_negative(cold_start_steps=self.cold_start_steps)


@dataclass(frozen=True, kw_only=True)
class RewardStudentConfig(SteppingStudentConfig):
    """The few-step generator that is made better: a distilled one, `init`. With adapters its own were adapters, too,
    of the same rank, alpha and layers, and these are trained on."""

    updates_per_rollout: int = 1
    """Updates on one rollout, with the ratio as importance weight where the method has one."""

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, updates_per_rollout=self.updates_per_rollout)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class RewardRunConfig:
    """A few-step student made better by a reward (docs/methods/reward.md).

    One of the sections of `METHODS` is there, and is the method. The sections matching and fake_score are there
    together, where the student is matched to the teacher.
    """

    METHODS: ClassVar[tuple[str, ...]] = (
        "rtdmd",
        "gndm",
        "redmd",
        "nft",
        "crd",
        "flash",
        "euphonium",
        "flow_grpo",
    )

    teacher: TeacherConfig
    """The model that the student was distilled from."""
    data: SampleDataConfig
    """What the run reads."""
    run: RunConfig
    """Where and how long the run goes."""
    student: RewardStudentConfig
    """The few-step generator."""
    reward: RewardSettings
    """What is rewarded."""
    matching: RewardMatchingConfig | None = None
    """Distribution matching; leave it out for none."""
    fake_score: FakeScoreConfig | None = None
    """The network that follows the student's distribution, for matching; `ratio` on each
    rollout."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is measured beside the reward."""
    validation: ValidationConfig | None = None
    """Measures while it trains, and the best weights kept; leave it out for none."""
    rtdmd: RtdmdConfig | None = None
    """RTDMD."""
    gndm: GndmConfig | None = None
    """GNDMR."""
    redmd: RedmdConfig | None = None
    """Re-DMD, Stream-R1."""
    nft: NftConfig | None = None
    """DiffusionNFT."""
    crd: CrdConfig | None = None
    """CRD."""
    flash: FlashConfig | None = None
    """Flash-DMD."""
    euphonium: EuphoniumConfig | None = None
    """Euphonium."""
    flow_grpo: FlowGrpoConfig | None = None
    """Flow-GRPO."""

    def __post_init__(self) -> None:
        require_one_method(self)
        cold = self.matching is not None and self.matching.cold_start_steps > 0
        if self.student.init is None and self.student.path is None and not cold:
            raise ValueError(
                "student.init is empty; give the run directory of a student from scripts/train_dmd.py, the folder of "
                "one as student.path (scripts/export_network.py), or start from the teacher with "
                "matching.cold_start_steps of matching alone"
            )
        check_groups(self.reward, self.run, cold_start=0 if self.matching is None else self.matching.cold_start_steps)
        check_comparison(self)
        check_matching(self)
        check_random_steps(self)
        check_direct(self)

    @property
    def method(self) -> str:
        """Name of the method, kept with the export."""
        return require_one_method(self)

    @property
    def section(self) -> MethodConfig:
        """The section that is there."""
        return getattr(self, require_one_method(self))

    @property
    def transition(self) -> TransitionConfig:
        """How random steps are drawn: as the method's section says, or by the student's own sampler."""
        section = self.section
        return section if isinstance(section, TransitionConfig) else TransitionConfig()

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


def check_groups(reward: ScorersConfig, run: RunConfig, *, cold_start: int) -> None:
    """Raise ValueError unless every slice of a step holds whole groups."""
    slices = run.gradient_accumulation
    if reward.group_size < 2 and cold_start < run.steps:
        raise ValueError(
            f"reward.group_size is {reward.group_size}; a comparison needs at least 2 (1 where "
            "matching.cold_start_steps is the whole run)"
        )
    if run.batch_size % (reward.group_size * slices):
        raise ValueError(
            f"reward.group_size {reward.group_size} does not divide run.batch_size {run.batch_size} cut into "
            f"{slices} slices; every slice holds whole groups"
        )


def check_comparison(config: RewardRunConfig) -> None:
    """Raise ValueError for settings of advantages where the method follows the sum of the rewards itself."""
    reward = config.reward
    follows_sum = isinstance(config.section, RedmdConfig | GndmConfig | FlashConfig)
    if follows_sum and (reward.combination, reward.scale) != ("sum", "residual"):
        raise ValueError(
            f"reward.combination is {reward.combination!r} and reward.scale {reward.scale!r}: {config.method} follows "
            "the sum of the rewards, without advantages made of them; leave both out"
        )


def check_matching(config: RewardRunConfig) -> None:
    """Raise ValueError for matching without its parts, or of a kind that the method does not have."""
    matching, fake_score, section = config.matching, config.fake_score, config.section
    if (matching is None) != (fake_score is None):
        there, lacking = ("fake_score", "matching") if matching is None else ("matching", "fake_score")
        raise ValueError(f"the section {there} needs {lacking}: give both to match the teacher, or neither")
    if fake_score is not None and fake_score.ratio < 1:
        raise ValueError(f"fake_score.ratio is {fake_score.ratio}; it must be at least 1")
    if matching is None:
        if isinstance(section, RtdmdConfig | GndmConfig | RedmdConfig | FlashConfig):
            raise ValueError(
                f"{config.method} is distribution matching with a reward; give the sections matching and fake_score"
            )
        return
    if matching.ambient is not None and isinstance(section, RedmdConfig | GndmConfig):
        raise ValueError(f"{config.method} has its own form of matching on x0; leave matching.ambient out")
    if matching.steps == "early" and (not isinstance(section, FlashConfig) or section.pixel_gan is None):
        raise ValueError(
            "matching.steps 'early' leaves late steps to the pixel GAN; give the section flash.pixel_gan, or set it to "
            "'any' or 'last'"
        )


def check_direct(config: RewardRunConfig) -> None:
    """Raise ValueError for the reward's own gradient where a scorer is not there, or nothing clean is compared."""
    names = [entry.name for entry in config.reward.scorers]
    for key in ("direct", "tilted_teacher"):
        term = getattr(config.section, key, None)
        unknown = [] if term is None else [name for name in term.scorers if name not in names]
        if unknown:
            raise ValueError(
                f"{config.method}.{key}.scorers names {unknown[0]!r}; reward.scorers has {', '.join(names)}"
            )
    matching = config.matching
    is_tilted = getattr(config.section, "tilted_teacher", None) is not None
    law = None if matching is None else matching.score_times
    if is_tilted and law is not None and law.unit == "time" and law.max >= 1:
        raise ValueError(
            f"matching.score_times.max is {law.max} with {config.method}.tilted_teacher, which reads the reward at a "
            "noised sample: at t = 1 there is none of it; set max below 1, such as 0.98"
        )
    if is_tilted and matching is not None and matching.ambient is not None and matching.steps != "last":
        raise ValueError(
            f"{config.method}.tilted_teacher with matching.ambient and matching.steps {matching.steps!r}: ambient "
            "matching compares clean predictions at the last step alone; set steps to 'last', or leave ambient out"
        )


def check_random_steps(config: RewardRunConfig) -> None:
    """Raise ValueError for a student whose steps the method cannot learn from."""
    section, student = config.section, config.student
    if not isinstance(section, TransitionConfig):
        return
    if student.steps < 2:
        raise ValueError(
            f"{config.method} learns from random steps before the last one; set student.steps to 2 or more"
        )
    if section.transition == "sampler" and student.sampler == "ode":
        raise ValueError(
            f"the steps of student.sampler 'ode' are not random; set {config.method}.transition to cps or flow_sde"
        )
    if section.transition in ("flow_sde", "dance_sde") and student.sampler == "sde":
        raise ValueError(
            f"{config.method}.transition {section.transition!r} explores around the ODE, and student.sampler 'sde' "
            "re-noises; use 'sampler' or 'cps', or a student of 'ode'"
        )
    if isinstance(section, ChainConfig) and section.trained_steps >= student.steps:
        raise ValueError(
            f"{config.method}.trained_steps is {section.trained_steps}; {student.steps} steps have "
            f"{student.steps - 1} random ones"
        )
