"""Settings of a run that makes a causal video student better by a reward. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.stages.sections import CausalStudentConfig, PromptsConfig
from fewstep.core.config import RunConfig, require_one_method
from fewstep.core.settings import TeacherConfig
from fewstep.dmd.reward.config import DecayConfig, MonitorConfig, RewardSettings

# Bounds of the share of samples that are held back (`RiskShare`).
LOWEST_SHARE, HIGHEST_SHARE = 0.02, 0.2


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig:
    """The pull to the reference for candidates that one reward likes more than the others do."""

    auxiliary: tuple[str, ...]
    """Entries of reward.scorers that the primary reward is compared with; one of weight 0 is compared with and not
    followed."""
    weight: float = 1e-4
    """Of the penalty."""
    primary: str | None = None
    """The entry of reward.scorers that may be hacked; empty is their weighted sum."""
    share: float = 0.1
    """Share of the candidates with a gap that are held back at first; it is steered between 0.02 and 0.2."""
    max_penalty: float = 0.15
    """Penalty at which the reference becomes the student of that step."""
    max_steps: int = 15
    """Steps after which it does so at the latest."""

    def __post_init__(self) -> None:
        if not self.weight > 0 or not self.max_penalty > 0 or self.max_steps < 1:
            raise ValueError(
                f"weight is {self.weight}, max_penalty {self.max_penalty} and max_steps {self.max_steps}; weight and "
                "max_penalty must be positive and max_steps at least 1; leave the section out for no penalty"
            )
        if not LOWEST_SHARE <= self.share <= HIGHEST_SHARE:
            raise ValueError(f"share is {self.share}; it must lie in [{LOWEST_SHARE}, {HIGHEST_SHARE}]")
        if not self.auxiliary:
            raise ValueError(
                "auxiliary is empty: name the entries of reward.scorers that the trained reward is compared with, or "
                "leave the section out for no penalty"
            )


@dataclass(frozen=True, kw_only=True)
class AstrolabeConfig:
    """Regression on candidates of an older policy in a window of a stream (arXiv:2603.17051)."""

    chunks: int
    """Chunks of the window: generated once per candidate, judged, and trained. What lies before it is generated once
    per prompt."""
    longest_chunks: int | None = None
    """Chunks of the longest stream: the window lies anywhere up to its end. Empty is the length of student.layout."""
    nft_beta: float = 1.0
    """Strength of the interpolation between older policy and student; the released presets have 0.1."""
    max_advantage: float = 5.0
    """Advantage at which a candidate counts as certainly good, or bad."""
    # The paper's average. The released code takes that of DiffusionNFT: start 0, slope 0.001, ceiling 0.5.
    old: DecayConfig = field(default_factory=lambda: DecayConfig(start=0.9, slope=0.0, ceiling=0.9))
    """How much of the older policy stays at each step."""
    penalty: PenaltyConfig | None = None
    """What holds suspicious candidates back; leave it out for none, and no reference network."""

    def __post_init__(self) -> None:
        if not self.nft_beta > 0 or not self.max_advantage > 0:
            raise ValueError(
                f"nft_beta is {self.nft_beta} and max_advantage {self.max_advantage}; both must be positive"
            )
        old = self.old
        if not 0 <= old.start <= old.ceiling <= 1 or old.slope < 0 or old.delay < 0:
            raise ValueError("old needs 0 <= start <= ceiling <= 1, and slope and delay of 0 or more")


@dataclass(frozen=True, kw_only=True)
class CausalRewardConfig:
    """A causal video student made better by a reward (docs/methods/causal_reward.md).

    The section of `METHODS` is there, and is the method.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("astrolabe",)

    teacher: TeacherConfig
    """The bidirectional model that the student was made from: it encodes prompts, decodes, and stands beside the
    student on contact sheets."""
    data: PromptsConfig
    """What the run reads: prompts alone."""
    run: RunConfig
    """Where and how long the run goes; batch_size counts candidates."""
    student: CausalStudentConfig
    """The causal generator; `init` is the run of an earlier stage, a checkpoint of it, an export, or a .safetensors
    file."""
    reward: RewardSettings
    """What is rewarded: scorers of videos, and those of pictures for the mean of their frames."""
    astrolabe: AstrolabeConfig | None = None
    """Windows of streams, and how the student follows their reward."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """What is measured beside the reward."""

    def __post_init__(self) -> None:
        require_one_method(self)
        if self.student.init is None:
            raise ValueError(
                "student.init is empty; give the run directory of a few-step student from scripts/train_causal_video.py"
            )
        check_window(self)
        check_groups(self)

    @property
    def method(self) -> str:
        """Name of the method, kept with the export."""
        return require_one_method(self)

    @property
    def section(self) -> AstrolabeConfig:
        """The section that is there."""
        assert self.astrolabe is not None
        return self.astrolabe

    @property
    def longest_chunks(self) -> int:
        """Chunks of the longest stream."""
        longest = self.section.longest_chunks
        return len(self.student.layout) if longest is None else longest


def check_window(config: CausalRewardConfig) -> None:
    """Raise ValueError unless the window lies in the stream, and the cache of a long stream is bounded."""
    chunks, layout = config.section.chunks, ChunkLayout(config.student.layout)
    if not 1 <= chunks <= config.longest_chunks:
        raise ValueError(
            f"astrolabe.chunks is {chunks}; it must be from 1 to the {config.longest_chunks} chunks of the longest "
            "stream (astrolabe.longest_chunks, or else student.layout)"
        )
    if config.longest_chunks > layout.chunks and config.student.policy.window_frames is None:
        raise ValueError(
            f"astrolabe.longest_chunks is {config.longest_chunks}, more than the {layout.chunks} of student.layout, "
            "and student.policy forgets nothing: set student.policy.window_frames, or the cache grows with the stream"
        )


def check_groups(config: CausalRewardConfig) -> None:
    """Raise ValueError for slices that cut groups, and for a penalty whose rewards are not there."""
    if config.reward.group_size < 2:
        raise ValueError(f"reward.group_size is {config.reward.group_size}; a comparison needs at least 2")
    run, size = config.run, config.reward.group_size
    if run.batch_size % (size * run.gradient_accumulation):
        raise ValueError(
            f"reward.group_size {size} does not divide run.batch_size {run.batch_size} cut into "
            f"{run.gradient_accumulation} slices; every slice holds whole groups"
        )
    penalty, names = config.section.penalty, [entry.name for entry in config.reward.scorers]
    if penalty is None:
        return
    asked = [*penalty.auxiliary, *([] if penalty.primary is None else [penalty.primary])]
    if len(set(asked)) != len(asked) or any(names.count(name) != 1 for name in asked):
        raise ValueError(
            f"astrolabe.penalty.primary {penalty.primary!r} and auxiliary {list(penalty.auxiliary)} must be different "
            f"entries of reward.scorers, whose names are {names}"
        )
