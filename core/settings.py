"""Sections that the settings of several methods share. No torch here, so that `--help` is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fewstep.core.config import OptimizerConfig


def require_adapters(rank: int, alpha: float, default: float) -> None:
    """Raises ValueError for a rank below 0, or a scale of adapters where there are none."""
    if rank < 0:
        raise ValueError(f"lora_rank is {rank}; it must be 0 (no adapters) or more")
    if rank == 0 and alpha != default:
        raise ValueError(f"lora_alpha is {alpha} with lora_rank 0, where there are no adapters: leave it out")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model to distil."""

    path: str
    """Diffusers directory or hub id of the teacher pipeline."""
    guidance: float = 1.0
    """Guidance weight w of the real score, u + w (c - u); 1 is no guidance."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which the frozen teacher is kept."""
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of its autoencoder, whose rounding is seen in sample grids and in what rewards judge."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance is {self.guidance}; it must be a number")


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The few-step generator."""

    optimizer: OptimizerConfig
    """Optimizer of the student."""
    steps: int = 1
    """Network calls per sample."""
    shift: float = 1.0
    """Time shift of the step grid."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    lora_alpha: float = 64.0
    """Scale of the adapters, which are multiplied by lora_alpha / lora_rank."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass."""
    ema_decay: float = 0.99
    """Decay of the weight average per student update."""
    ema_start: int = 0
    """Student updates before averaging begins."""
    init: str | None = None
    """Weights to start from: a run directory or checkpoint (its average), an export, the folder of a network, or a
    .safetensors file; empty is the teacher."""

    def __post_init__(self) -> None:
        require_adapters(self.lora_rank, self.lora_alpha, type(self).lora_alpha)
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be positive")
        if not 0 <= self.ema_decay < 1 or self.ema_start < 0:
            raise ValueError(f"ema_decay {self.ema_decay} must lie in [0, 1), ema_start {self.ema_start} must be >= 0")


@dataclass(frozen=True, kw_only=True)
class SteppingStudentConfig(StudentConfig):
    """A student of the times of one grid, whose step between two of them can be chosen."""

    sampler: Literal["sde", "ode"] = "sde"
    """'sde' re-noises the prediction with fresh noise at each step, 'ode' takes Euler steps."""


@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig:
    """The network that follows the student's distribution."""

    optimizer: OptimizerConfig
    """Optimizer of the fake score and its discriminator heads."""
    updates_per_student_update: int = 5
    """DMD and rewards: fake-score updates for each student update (two-time-scale rule of DMD2), on the same samples.
    Beside consistency and in self_forcing: the length of a cycle, one step of which is the student's."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    lora_alpha: float = 64.0
    """Scale of the adapters."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass."""

    def __post_init__(self) -> None:
        require_adapters(self.lora_rank, self.lora_alpha, type(self).lora_alpha)
        if self.updates_per_student_update < 1:
            raise ValueError(
                f"updates_per_student_update is {self.updates_per_student_update}; it must be at least 1 (DMD2 uses 5)"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the run reads."""

    prompts: str
    """Text file, one prompt a line."""
    cache_prompts: bool = True
    """Encode every prompt once before training; turn off when the embeddings do not fit into memory."""
    height: int | None = None
    """Pixel height of the samples; empty is the teacher's own."""
    width: int | None = None
    """Pixel width of the samples; empty is the teacher's own."""
    sample_count: int = 10
    """Columns of the sample grid: the first prompts of the file, with fixed seeds."""

    def __post_init__(self) -> None:
        if self.sample_count < 1:
            raise ValueError(f"sample_count is {self.sample_count}; the sample grid needs at least 1 prompt")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and side < 1:
                raise ValueError(f"{name} is {side}; it must be at least 1 pixel")
