"""What a DMD run is made of: teacher, student, fake score and data, built from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset, PromptConditions, read_prompts, rows_of_samples
from fewstep.core.denoiser import Denoiser
from fewstep.core.discriminator import build_heads
from fewstep.core.export_schedulers import nearest_exportable_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.grids import step_grid
from fewstep.core.lora import add_lora
from fewstep.core.roles import Role
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher, check_teacher_path
from fewstep.core.trainer import Trainer
from fewstep.dmd.config import DmdConfig, FakeScoreConfig, StudentConfig

HEAD_WIDTH = 128
# Another order for real data and pairs than for prompts: the same seed would pair each prompt with the same picture.
REAL_SEED, PAIR_SEED = 1, 2


@dataclass(frozen=True)
class LatentSource:
    """A latent dataset with the embeddings of its prompts, read in its own order."""

    dataset: LatentDataset
    conditions: PromptConditions
    seed: int

    def rows(self, samples: Sequence[int], device: torch.device) -> tuple[list[int], Tensor, Condition]:
        """Row numbers, latents [B, C, H, W] and conditions for these sample numbers."""
        rows = rows_of_samples(samples, len(self.dataset.prompts), self.seed)
        return rows, self.dataset.latents[rows].to(device), self.conditions.rows(rows)

    def noise(self, rows: list[int], device: torch.device) -> Tensor:
        """The noise [B, C, H, W] that these rows were made from. Raises ValueError for latents that are no pairs."""
        if self.dataset.noise is None:
            raise ValueError("these latents have no noise; make pairs with scripts/make_teacher_pairs.py")
        return self.dataset.noise[rows].to(device)


@dataclass(frozen=True)
class DmdSetup:
    """Everything the loop calls. `latent_shape` is (C, h, w)."""

    teacher: Teacher
    student: Student
    student_role: Role
    fake_role: Role
    fake_score: FakeScore
    prompts: PromptConditions
    latent_shape: tuple[int, int, int]
    real: LatentSource | None
    pairs: LatentSource | None


@dataclass(frozen=True)
class DmdData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    real: LatentDataset | None
    pairs: LatentDataset | None

    @classmethod
    def read(cls, config: DmdConfig) -> DmdData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_teacher_path(config.teacher.path)
        init = config.student.init
        if init is not None and not Path(init).is_file():
            raise ValueError(f"student.init {init} does not exist; give a .safetensors file of student weights")
        data, loss = config.data, config.loss
        real = LatentDataset.load(data.latents) if data.latents is not None and loss.gan_weight > 0 else None
        pairs = LatentDataset.load(data.pairs) if data.pairs is not None and loss.regression_weight > 0 else None
        if pairs is not None and pairs.noise is None:
            raise ValueError(f"{data.pairs} holds latents without noise; make pairs with scripts/make_teacher_pairs.py")
        return cls(read_prompts(data.prompts), real, pairs)


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, h, w) of a picture's latents. Raises ValueError for a teacher of videos, whose latents have frames."""
    if len(shape) != 3:
        raise ValueError(
            f"this teacher makes videos, latents {shape}, and this script trains students for pictures: use "
            "scripts/train_consistency.py, or scripts/train_causal_video.py for streams"
        )
    return shape[0], shape[1], shape[2]


def build_setup(config: DmdConfig, data: DmdData, trainer: Trainer) -> DmdSetup:
    """Load the teacher, copy it into student and fake score, and hand both to the trainer.

    Raises ValueError when a component, a size or a file of weights does not fit.
    """
    teacher = Teacher.load(config.teacher.path, device=trainer.device, dtype=getattr(torch, config.teacher.dtype))
    size = (config.data.height, config.data.width)
    shape = image_shape(teacher.latent_shape(*size, frames=config.data.frames))
    for name, dataset in (("latents", data.real), ("pairs", data.pairs)):
        if dataset is not None and tuple(dataset.latents.shape[1:]) != shape:
            found = tuple(dataset.latents.shape[1:])
            raise ValueError(
                f"data.{name} holds latents of shape {found}, this run makes {shape}; set data.height/width"
            )

    denoiser = build_student_denoiser(config.student, teacher, seed=config.run.seed)
    times = nearest_exportable_times(teacher.pipeline, step_grid(config.student.steps, shift=config.student.shift))
    student = Student(denoiser, times, config.student.sampler)
    fake_score = build_fake_score(
        config.fake_score, teacher, seed=config.run.seed, with_heads=config.loss.gan_weight > 0
    )
    student_role = trainer.add_role(
        "student",
        denoiser,
        config.student.optimizer,
        ema_decay=config.student.ema_decay,
        ema_start=config.student.ema_start,
        every=config.fake_score.updates_per_student_update,
    )
    fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)

    def embed(prompts: Sequence[str]) -> PromptConditions:
        return PromptConditions(
            teacher, prompts, cache=config.data.cache_prompts, height=config.data.height, width=config.data.width
        )

    def source(dataset: LatentDataset | None, offset: int) -> LatentSource | None:
        return None if dataset is None else LatentSource(dataset, embed(dataset.prompts), config.run.seed + offset)

    return DmdSetup(
        teacher=teacher,
        student=student,
        student_role=student_role,
        fake_role=fake_role,
        fake_score=fake_score,
        prompts=embed(data.prompts),
        latent_shape=shape,
        real=source(data.real, REAL_SEED),
        pairs=source(data.pairs, PAIR_SEED),
    )


def build_student_denoiser(settings: StudentConfig, teacher: Teacher, *, seed: int) -> Denoiser:
    """A trainable fp32 copy of the teacher's network, from `student.init` if given, or with adapters if asked.

    Raises ValueError for both: adapters are stored alone, and an export would put them on the teacher's weights.
    """
    if settings.init is not None and settings.lora_rank > 0:
        raise ValueError(
            f"student.init {settings.init} with student.lora_rank {settings.lora_rank}: adapters are saved without the "
            "weights under them. Set lora_rank to 0, or export the first student and give it as teacher.path"
        )
    denoiser = teacher.denoiser.copy().float()
    if settings.init is not None:
        load_weights(denoiser, settings.init)
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


def load_weights(denoiser: Denoiser, path: str) -> None:
    """Load student weights from a safetensors file of an export (`transformer/`, `unet/`) or of a checkpoint.

    Raises ValueError when the file is unreadable, or does not hold exactly this network's weights.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"student.init {path} cannot be read ({error}); give a .safetensors file") from error
    plain = {name.removeprefix("network."): tensor for name, tensor in tensors.items()}
    missing, unexpected = denoiser.network.load_state_dict(plain, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"student.init {path} does not fit the teacher's network: {len(missing)} weights missing "
            f"{missing[:3]}, {len(unexpected)} unknown {unexpected[:3]}"
        )
