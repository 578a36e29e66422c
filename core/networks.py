"""Trained networks that are made of a teacher: the student, and the fake score with its heads."""

from __future__ import annotations

from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import build_heads
from fewstep.core.fake_score import FakeScore
from fewstep.core.lora import add_lora
from fewstep.core.settings import FakeScoreConfig, StudentConfig
from fewstep.core.teacher import Teacher
from fewstep.core.weights import StoredWeights, load_weights

HEAD_WIDTH = 128


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents. Raises ValueError for a teacher of videos, whose latents have frames."""
    if len(shape) != 3:
        raise ValueError(
            f"this teacher makes videos, latents {shape}, and this script trains students for pictures: use "
            "scripts/train_consistency.py, or scripts/train_causal_video.py for streams"
        )
    return shape[0], shape[1], shape[2]


def build_student_denoiser(
    settings: StudentConfig, teacher: Teacher, init: StoredWeights | None, *, seed: int
) -> Denoiser:
    """A trainable fp32 copy of the teacher's network, from `init` if given, or with adapters if asked.

    Raises ValueError for both: adapters are stored alone, and an export would put them on the teacher's weights.
    """
    if init is not None and settings.lora_rank > 0:
        raise ValueError(
            f"student.init {init.source} with student.lora_rank {settings.lora_rank}: adapters are saved without the "
            "weights under them. Set lora_rank to 0, or export the first student and give it as teacher.path"
        )
    denoiser = teacher.denoiser.copy().float()
    if init is not None:
        load_weights(denoiser.network, init)
    if settings.gradient_checkpointing:
        denoiser.network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    if settings.lora_rank > 0:
        targets = teacher.family.lora_targets
        rank, alpha = settings.lora_rank, settings.lora_alpha
        add_lora(denoiser.network, rank=rank, alpha=alpha, targets=targets, seed=seed)
    return denoiser


def build_fake_score(settings: FakeScoreConfig, teacher: Teacher, *, seed: int, with_heads: bool) -> FakeScore:
    """A trainable fp32 copy of the teacher's network, with discriminator heads if asked."""
    trunk = teacher.denoiser.copy().float()
    if settings.gradient_checkpointing:
        trunk.network.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]
    heads = None
    if with_heads:
        heads = build_heads(trunk, None, width=HEAD_WIDTH, seed=seed)
    if settings.lora_rank > 0:
        targets = teacher.family.lora_targets
        rank, alpha = settings.lora_rank, settings.lora_alpha
        add_lora(trunk.network, rank=rank, alpha=alpha, targets=targets, seed=seed + 1)
    return FakeScore(trunk, heads=heads)
