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


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The few-step generator."""

    optimizer: OptimizerConfig
    """Optimizer of the student."""
    steps: int = 1
    """Network calls per sample."""
    shift: float = 1.0
    """Time shift of the step grid."""
    sampler: Literal["sde", "ode", "flow_map"] = "sde"
    """'sde' re-noises the prediction with fresh noise at each step, 'ode' takes Euler steps, 'flow_map' the jumps of a
    network of two times (consistency methods that have one)."""
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
    """Safetensors file of student weights to start from (an export's transformer or unet); empty is the teacher."""


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
    latents: str | None = None
    """Folder of real latents (scripts/encode_latents.py), for the GAN."""
    pairs: str | None = None
    """Folder of teacher pairs (scripts/make_teacher_pairs.py), for the regression loss."""
    height: int | None = None
    """Pixel height of the samples; empty is the teacher's own."""
    width: int | None = None
    """Pixel width of the samples; empty is the teacher's own."""
    frames: int | None = None
    """Pixel frames of videos; empty is the teacher's own, and for pictures."""
    sample_count: int = 10
    """Columns of the sample grid: the first prompts of the file, with fixed seeds."""
