"""What a DMD run is made of: teacher, student, fake score and data, built from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.core.data import PAIR_SEED, REAL_SEED, LatentDataset, LatentSource, PromptConditions, read_prompts
from fewstep.core.export.schedulers import student_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.networks.build import build_denoiser, build_fake_score
from fewstep.core.networks.other_models import check_models
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.weights import StoredWeights, find_weights
from fewstep.dmd.config import DmdConfig


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


@dataclass(frozen=True)
class DmdData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    init: StoredWeights | None
    real: LatentDataset | None
    pairs: LatentDataset | None

    @classmethod
    def read(cls, config: DmdConfig) -> DmdData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_models(config.teacher, student=config.student, fake_score=config.fake_score)
        init = None if config.student.init is None or config.run.resume else find_weights(config.student.init)
        real = None if config.gan is None else LatentDataset.load(config.gan.latents)
        pairs = None if config.regression is None else LatentDataset.load(config.regression.pairs)
        if pairs is not None:
            pairs.require_noise("regression.pairs")
        return cls(read_prompts(config.data.prompts), init, real, pairs)


def build_setup(config: DmdConfig, data: DmdData, trainer: Trainer) -> DmdSetup:
    """Load the teacher, copy it into student and fake score, and hand both to the trainer.

    Raises ValueError when a component, a size or a file of weights does not fit.
    """
    teacher = Teacher.of(config.teacher, device=trainer.device)
    shape = teacher.latent_shape(config.data.height, config.data.width, frames=config.data.frames)
    for key, dataset in (("gan.latents", data.real), ("regression.pairs", data.pairs)):
        if dataset is not None:
            dataset.require_shape(shape, key)

    denoiser = build_denoiser(config.student, teacher, data.init, seed=config.run.seed)
    times = student_times(teacher.pipeline, config.student)
    student = Student(denoiser, times, config.student.sampler)
    fake_score = build_fake_score(config.fake_score, teacher, seed=config.run.seed, with_heads=config.gan is not None)
    student_role = trainer.add_role(
        "student",
        denoiser,
        config.student.optimizer,
        ema=EmaSettings.of_student(config.student),
        every=config.fake_score.ratio,
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
