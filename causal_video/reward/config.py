"""Settings of a run that makes a causal video student better by a reward. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.stages.config import CausalConfig, CausalDataConfig, CausalStudentConfig
from fewstep.core.config import RunConfig
from fewstep.core.settings import TeacherConfig
from fewstep.dmd.reward.config import DecayConfig, MonitorConfig, RewardSettings

# Of scripts/train_causal_reward.py, beside the stages of scripts/train_causal_video.py.
REWARD_METHODS = ("astrolabe",)
# Bounds of the share of samples that are held back (`RiskShare`).
LOWEST_SHARE, HIGHEST_SHARE = 0.02, 0.2


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Which part of a stream is judged and trained."""

    chunks: int
    """Chunks of the window: generated once per candidate, judged, and trained. What lies before it is generated once
    per prompt."""
    longest_chunks: int | None = None
    """Chunks of the longest stream: the window lies anywhere up to its end. Empty is the length of student.layout."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Regression on candidates of an older policy."""

    nft_beta: float = 1.0
    """Strength of the interpolation between older policy and student; the released presets have 0.1."""
    max_advantage: float = 5.0
    """Advantage at which a candidate counts as certainly good, or bad."""
    # The paper's average. The released code takes that of DiffusionNFT: start 0, slope 0.001, ceiling 0.5.
    old: DecayConfig = field(default_factory=lambda: DecayConfig(start=0.9, slope=0.0, ceiling=0.9))
    """How much of the older policy stays at each step."""


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """The pull to the reference for candidates that one reward likes more than the others do."""

    weight: float = 1e-4
    """Of the penalty; 0 has no reference network."""
    primary: str | None = None
    """The entry of reward.scorers that may be hacked; empty is their weighted sum."""
    auxiliary: tuple[str, ...] = ()
    """Entries of reward.scorers that it is compared with; one of weight 0 is compared with and not followed."""
    share: float = 0.1
    """Share of the candidates with a gap that are held back at first; it is steered between 0.02 and 0.2."""
    max_penalty: float = 0.15
    """Penalty at which the reference becomes the student of that step."""
    max_steps: int = 15
    """Steps after which it does so at the latest."""


@dataclass(frozen=True, kw_only=True)
class CausalRewardConfig:
    """A causal video student made better by a reward (docs/methods/causal_reward.md)."""

    method: Literal["astrolabe"] = "astrolabe"
    """Name of the method."""
    teacher: TeacherConfig
    """The bidirectional model that the student was made from: it encodes prompts, decodes, and stands beside the
    student on contact sheets."""
    data: CausalDataConfig
    """What the run reads: prompts alone."""
    run: RunConfig
    """Where and how long the run goes; batch_size counts candidates."""
    student: CausalStudentConfig
    """The causal generator; `init` is the run of an earlier stage, a checkpoint of it, or a safetensors file."""
    reward: RewardSettings
    """What is rewarded: scorers of videos, and those of pictures for the mean of their frames."""
    window: WindowConfig
    """Which part of a stream is judged and trained."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Regression on candidates of an older policy."""
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    """What holds suspicious candidates back."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is measured beside the reward."""

    def __post_init__(self) -> None:
        check_inputs(self)
        self.as_stage()
        check_window(self)
        check_policy(self)
        check_penalty(self)

    @property
    def longest_chunks(self) -> int:
        """Chunks of the longest stream."""
        return len(self.student.layout) if self.window.longest_chunks is None else self.window.longest_chunks

    def as_stage(self) -> CausalConfig:
        """The same as a training stage, for what is made for these: reading weights and prompts, contact sheets.

        `ode` is the stage whose student steps by its schedule, and which needs neither videos nor a fake score.
        """
        return CausalConfig(method="ode", teacher=self.teacher, data=self.data, run=self.run, student=self.student)


def check_inputs(config: CausalRewardConfig) -> None:
    """Raise ValueError for a start or for data that this loop does not use."""
    data = config.data
    if config.student.init is None:
        raise ValueError(
            "student.init is empty; give the run directory of a few-step student from scripts/train_causal_video.py"
        )
    if data.image_share > 0 or data.controls is not None or data.pairs is not None:
        raise ValueError(
            "data.image_share, data.controls and data.pairs are not for this loop, whose streams follow prompts alone: "
            "leave them out"
        )


def check_window(config: CausalRewardConfig) -> None:
    """Raise ValueError unless the window lies in the stream, and the cache of a long stream is bounded."""
    window, layout = config.window, ChunkLayout(config.student.layout)
    if not 1 <= window.chunks <= config.longest_chunks:
        raise ValueError(
            f"window.chunks is {window.chunks}; it must be from 1 to the {config.longest_chunks} chunks of the longest "
            "stream (window.longest_chunks, or else student.layout)"
        )
    if config.longest_chunks > layout.chunks and config.student.policy.window_frames is None:
        raise ValueError(
            f"window.longest_chunks is {config.longest_chunks}, more than the {layout.chunks} of student.layout, and "
            "student.policy forgets nothing: set student.policy.window_frames, or the cache grows with the stream"
        )


def check_policy(config: CausalRewardConfig) -> None:
    """Raise ValueError for groups and strengths that cannot work."""
    run, policy, size = config.run, config.policy, config.reward.group_size
    if run.batch_size % (size * run.gradient_accumulation):
        raise ValueError(
            f"reward.group_size {size} does not divide run.batch_size {run.batch_size} cut into "
            f"{run.gradient_accumulation} slices; every slice holds whole groups"
        )
    if not policy.nft_beta > 0 or not policy.max_advantage > 0:
        raise ValueError(
            f"policy.nft_beta is {policy.nft_beta} and max_advantage {policy.max_advantage}; both must be positive"
        )
    old = policy.old
    if not 0 <= old.start <= old.ceiling <= 1 or old.slope < 0 or old.delay < 0:
        raise ValueError("policy.old needs 0 <= start <= ceiling <= 1, and slope and delay of 0 or more")


def check_penalty(config: CausalRewardConfig) -> None:
    """Raise ValueError for a penalty whose rewards are not there, or whose numbers are out of range."""
    penalty, names = config.penalty, [entry.name for entry in config.reward.scorers]
    if penalty.weight < 0 or not penalty.max_penalty > 0 or penalty.max_steps < 1:
        raise ValueError("penalty.weight must be 0 or more, max_penalty positive and max_steps at least 1")
    if not LOWEST_SHARE <= penalty.share <= HIGHEST_SHARE:
        raise ValueError(f"penalty.share is {penalty.share}; it must lie in [{LOWEST_SHARE}, {HIGHEST_SHARE}]")
    if penalty.weight == 0:
        return
    if not penalty.auxiliary:
        raise ValueError(
            "penalty.auxiliary is empty: name the entries of reward.scorers that the trained reward is compared with, "
            "or set penalty.weight to 0"
        )
    asked = [*penalty.auxiliary, *([] if penalty.primary is None else [penalty.primary])]
    if len(set(asked)) != len(asked) or any(names.count(name) != 1 for name in asked):
        raise ValueError(
            f"penalty.primary {penalty.primary!r} and penalty.auxiliary {list(penalty.auxiliary)} must be different "
            f"entries of reward.scorers, whose names are {names}"
        )
