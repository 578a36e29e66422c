"""Settings of the training of a latent reward model. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import TeacherConfig
from fewstep.dmd.reward.config import ScorersConfig, check_groups

PAIR_TEMPERATURE = 0.1


@dataclass(frozen=True, kw_only=True)
class LatentSamplesConfig:
    """The clean samples that are scored once, decoded, before the training."""

    source: str
    """Run directory of a student, whose averaged weights draw them, or a folder of latents (encode_latents.py)."""
    prompts: str | None = None
    """Text file, one prompt a line, for a student; leave it out for latents, which have their own."""
    count: int = 4096
    """How many samples; of latents those groups of one prompt that are complete, up to this number."""
    held_out: float = 0.2
    """Share of the groups that is kept from the training, to judge it by."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.held_out < 1:
            raise ValueError(f"{self}: count must be at least 1, and held_out above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class LatentNetworkConfig:
    """Sizes of the network."""

    width: int = 64
    """Channels, a multiple of 8."""
    blocks: int = 3
    """Residual blocks; the latents are halved between them."""


@dataclass(frozen=True, kw_only=True)
class LatentRewardConfig:
    """A model that scores noisy latents as a scorer would score their clean pictures (docs/methods/reward.md)."""

    teacher: TeacherConfig
    """The model whose latents are scored; its decoder and prompt encoder are used."""
    samples: LatentSamplesConfig
    """What it learns from."""
    reward: ScorersConfig
    """The reward of a clean sample; `group_size` samples of each prompt are compared."""
    run: RunConfig
    """Where and how long the run goes; it draws no grids, so sample_every is not read."""
    optimizer: OptimizerConfig
    """Optimizer of the model."""
    network: LatentNetworkConfig = field(default_factory=LatentNetworkConfig)
    """Sizes of the model."""
    objective: Literal["regression", "bradley_terry"] = "bradley_terry"
    """'regression' on the reward, whose optimum is its mean over the clean samples of a state, or 'bradley_terry' on
    the pairs of a prompt, which ranks them."""
    temperature: float = PAIR_TEMPERATURE
    """Of the pairs' labels, in standard deviations of the reward over the samples; leave it out for 'regression'."""
    t_min: float = 0.02
    """Smallest time to which samples are noised."""
    t_max: float = 0.98
    """Largest such time."""
    report_times: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Times at which the agreement on held-out samples is reported."""

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1 or not self.temperature > 0:
            raise ValueError(
                f"t_min {self.t_min}, t_max {self.t_max}, temperature {self.temperature}: allowed are "
                "0 <= t_min < t_max <= 1 and temperature > 0"
            )
        if not self.report_times or not all(0 <= t <= 1 for t in self.report_times):
            raise ValueError(f"report_times is {self.report_times}; give at least one time in [0, 1]")
        if self.objective == "regression" and self.temperature != PAIR_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}: 'regression' has no pairs to read it; leave it out")
        if self.teacher.guidance != 1.0:
            raise ValueError(
                f"teacher.guidance is {self.teacher.guidance}: the teacher decodes and encodes prompts here, and does "
                "not sample; leave it out"
            )
        check_groups(self.reward, self.run, cold_start=0)
