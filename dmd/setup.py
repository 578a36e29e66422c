"""What a DMD run is made of: teacher, student, fake score and data, built from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fewstep.core.data import (
    INPUT_SEED,
    PAIR_SEED,
    REAL_SEED,
    LatentDataset,
    LatentSource,
    PromptConditions,
    embedded_prompts,
    find_prompt_pictures,
    read_prompts,
)
from fewstep.core.export.schedulers import exportable_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.build import build_denoiser, build_fake_score, find_fake_score
from fewstep.core.networks.other_models import check_models
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import require_told_pictures
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import StoredWeights, find_weights
from fewstep.dmd.blended_real import BlendedReal
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.discriminator import build_gan_heads
from fewstep.dmd.matching import TeacherJudge
from fewstep.dmd.refl import SampleReward, differentiable_scorers
from fewstep.evaluation.scorers.scorer import Scorer


@dataclass(frozen=True)
class DmdSetup:
    """Everything the loop calls. `latent_shape` is (C, h, w), or (C, F, h, w) for videos."""

    teacher: Teacher
    student: Student
    student_role: Role
    fake_role: Role
    fake_score: FakeScore
    prompts: PromptConditions
    latent_shape: tuple[int, ...]
    real: LatentSource | None
    pairs: LatentSource | None
    inputs: LatentSource | None = None
    heads_role: Role | None = None
    blocks: tuple[int, ...] | None = None
    blended: BlendedReal | None = None
    reward: SampleReward | None = None

    @property
    def judge(self) -> TeacherJudge | None:
        """The discriminator on the teacher's features, for gradients to the samples, where there is one."""
        return None if self.heads_role is None else self.judge_of(self.heads_role.module)

    def judge_of(self, heads: nn.Module) -> TeacherJudge:
        """The discriminator with these heads, which may be wrapped."""
        return TeacherJudge(self.teacher.denoiser, heads, self.blocks)


@dataclass(frozen=True)
class DmdData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    init: StoredWeights | None
    real: LatentDataset | None
    pairs: LatentDataset | None
    inputs: LatentDataset | None
    fake_score: StoredWeights | None
    pictures: tuple[Path, ...] = ()

    @property
    def asked(self) -> tuple[str, ...]:
        """All that samples may be asked for."""
        return self.prompts if self.inputs is None else (*self.prompts, *self.inputs.prompts)

    def require_fit(self, teacher: Teacher, shape: tuple[int, ...]) -> None:
        """Raises ValueError for latents of another shape than the run's, or without what the teacher is told."""
        read = {"gan.latents": self.real, "regression.pairs": self.pairs, "noised_data.latents": self.inputs}
        for key, dataset in read.items():
            if dataset is not None:
                dataset.require_shape(shape, key)
                dataset.require_pictures(teacher, key)

    @classmethod
    def read(cls, config: DmdConfig) -> DmdData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_models(config.teacher, student=config.student, fake_score=config.fake_score)
        init = None if config.student.init is None or config.run.resume else find_weights(config.student.init)
        real = None if config.gan is None else LatentDataset.load(config.gan.latents)
        pairs = None if config.regression is None else LatentDataset.load(config.regression.pairs)
        if pairs is not None:
            pairs.require_noise("regression.pairs")
        folder = None if config.noised_data is None else config.noised_data.latents
        inputs = None if folder is None else LatentDataset.load(folder)
        fake_score = None if config.run.resume else find_fake_score(config.fake_score)
        prompts = read_prompts(config.data.prompts)
        pictures = find_prompt_pictures(config.data.pictures, prompts)
        require_told_pictures(config.teacher, pictures)
        return cls(prompts, init, real, pairs, inputs, fake_score, pictures)


def build_setup(
    config: DmdConfig, data: DmdData, trainer: Trainer, *, scorers: Sequence[Scorer] | None = None
) -> DmdSetup:
    """Load the teacher, copy it into student and fake score, and hand both to the trainer.

    `scorers` take the place of those that `refl.scorers` names. Raises ValueError when a component, a size or a file of
    weights does not fit.
    """
    # A scorer that is not there fails before the teacher is loaded.
    scorers = differentiable_scorers(config.refl, data.asked, scorers, device=trainer.device)
    teacher = Teacher.of(config.teacher, device=trainer.device)
    shape = teacher.latent_shape(config.data.height, config.data.width, frames=config.data.frames)
    data.require_fit(teacher, shape)
    reward = None
    if config.refl is not None:
        reward = SampleReward(config.refl, trainer, scorers, videos=len(shape) == 4)

    denoiser = build_denoiser(config.student, teacher, data.init, seed=config.run.seed)
    times = exportable_times(teacher.pipeline, teacher.family, config.student, config.student.sampler)
    student = Student(denoiser, times, config.student.sampler)
    fake_score, heads = build_judges(config, data, teacher, shape)
    student_role = trainer.add_role(
        "student",
        denoiser,
        config.student.optimizer,
        ema=EmaSettings.of_student(config.student),
        every=config.fake_score.ratio,
    )
    fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)
    heads_role = None
    if heads is not None and config.gan is not None and config.gan.optimizer is not None:
        heads_role = trainer.add_role("discriminator", heads, config.gan.optimizer)

    def embed(prompts: Sequence[str], pictures: Sequence[Path] = ()) -> PromptConditions:
        return embedded_prompts(teacher, config.data, prompts, pictures)

    def source(dataset: LatentDataset | None, offset: int) -> LatentSource | None:
        if dataset is None:
            return None
        return LatentSource(dataset, embed(dataset.prompts, dataset.pictures), config.run.seed + offset)

    return DmdSetup(
        teacher=teacher,
        student=student,
        student_role=student_role,
        fake_role=fake_role,
        fake_score=fake_score,
        blocks=None if config.gan is None else config.gan.chosen_blocks,
        blended=None if config.blended_real is None else BlendedReal(teacher, fake_score, config.blended_real),
        prompts=embed(data.prompts, data.pictures),
        latent_shape=shape,
        real=source(data.real, REAL_SEED),
        pairs=source(data.pairs, PAIR_SEED),
        inputs=source(data.inputs, INPUT_SEED),
        heads_role=heads_role,
        reward=reward,
    )


def build_judges(
    config: DmdConfig, data: DmdData, teacher: Teacher, shape: tuple[int, ...]
) -> tuple[FakeScore, nn.Module | None]:
    """The fake score, with heads where the discriminator is on its features; else the heads on the teacher's apart."""
    gan = config.gan
    seed, exits = config.run.seed, config.told_exits
    fake_score = build_fake_score(config.fake_score, teacher, data.fake_score, seed=seed, exits=exits)
    if gan is None:
        return fake_score, None
    on_teacher = gan.features == "teacher"
    trunk = teacher.denoiser if on_teacher else fake_score.denoiser
    told = teacher.with_first_frames(teacher.null_condition, torch.zeros((1, *shape)))
    heads = build_gan_heads(gan, trunk, shape=shape, null=told, seed=seed)
    if on_teacher:
        return fake_score, heads
    shift = fake_score.exit_shift
    return FakeScore(fake_score.denoiser, heads=heads, blocks=gan.chosen_blocks, exit_shift=shift), None
