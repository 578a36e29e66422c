"""Sections that the settings of several methods share. No torch here, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.core.config import OptimizerConfig


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
    """Weights to start from: a run directory or checkpoint (its average), an export, or a .safetensors file of its
    network; empty is the teacher."""


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
    """Fake-score updates for each student update (two-time-scale rule of DMD2)."""
    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    lora_alpha: float = 64.0
    """Scale of the adapters."""
    gradient_checkpointing: bool = False
    """Save memory by computing activations again in the backward pass."""


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
