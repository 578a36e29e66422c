"""What a consistency run is made of: teacher, student, data, and for rCM the fake score, built from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.consistency.config import ConsistencyConfig
from fewstep.core.data import LatentDataset, PromptConditions, read_prompts
from fewstep.core.export_schedulers import nearest_exportable_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.families.attention_jvp import check_denoiser_jvp, use_jvp_attention
from fewstep.core.grids import step_grid
from fewstep.core.roles import Role
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher, check_teacher_path
from fewstep.core.trainer import Trainer
from fewstep.dmd.setup import REAL_SEED, LatentSource, build_fake_score, build_student_denoiser

# Times and samples of the check before the first step: the middle of the path, and few samples.
CHECKED_TIMES = (0.3, 0.7)


@dataclass(frozen=True)
class ConsistencyData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    real: LatentDataset

    @classmethod
    def read(cls, config: ConsistencyConfig) -> ConsistencyData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_teacher_path(config.teacher.path)
        init = config.student.init
        if init is not None and not Path(init).is_file():
            raise ValueError(f"student.init {init} does not exist; give a .safetensors file of student weights")
        assert config.data.latents is not None
        return cls(read_prompts(config.data.prompts), LatentDataset.load(config.data.latents))


@dataclass(frozen=True)
class ConsistencySetup:
    """Everything the loop calls. `latent_shape` is (C, h, w); fake score and its role are rCM's."""

    teacher: Teacher
    student: Student
    student_role: Role
    prompts: PromptConditions
    latent_shape: tuple[int, int, int]
    real: LatentSource
    fake_score: FakeScore | None
    fake_role: Role | None


def build_setup(config: ConsistencyConfig, data: ConsistencyData, trainer: Trainer) -> ConsistencySetup:
    """Load the teacher, copy it into the student (and the fake score), and hand these to the trainer.

    Raises ValueError when a component or size does not fit, or the network has no tangent where one is needed.
    """
    teacher = Teacher.load(config.teacher.path, device=trainer.device, dtype=getattr(torch, config.teacher.dtype))
    shape = teacher.latent_shape(config.data.height, config.data.width)
    found = tuple(data.real.latents.shape[1:])
    if found != shape:
        raise ValueError(f"data.latents holds latents of shape {found}, this run makes {shape}; set data.height/width")

    denoiser = build_student_denoiser(config.student, teacher, seed=config.run.seed)
    if config.loss.objective == "scm" and config.loss.tangent == "jvp":
        try:
            use_jvp_attention(denoiser.network)
        except ValueError as error:
            raise ValueError(f"{error}: set loss.tangent to 'central'") from error
    times = nearest_exportable_times(teacher.pipeline, step_grid(config.student.steps, shift=config.student.shift))
    student_role = trainer.add_role(
        "student",
        denoiser,
        config.student.optimizer,
        ema_decay=config.student.ema_decay,
        ema_start=config.student.ema_start,
    )
    fake_score = fake_role = None
    if config.fake_score is not None:
        fake_score = build_fake_score(config.fake_score, teacher, seed=config.run.seed, with_heads=False)
        fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)

    def embed(prompts: Sequence[str]) -> PromptConditions:
        return PromptConditions(
            teacher, prompts, cache=config.data.cache_prompts, height=config.data.height, width=config.data.width
        )

    return ConsistencySetup(
        teacher=teacher,
        student=Student(denoiser, times, "sde"),
        student_role=student_role,
        prompts=embed(data.prompts),
        latent_shape=shape,
        real=LatentSource(data.real, embed(data.real.prompts), config.run.seed + REAL_SEED),
        fake_score=fake_score,
        fake_role=fake_role,
    )


def check_tangent(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> str | None:
    """Compare the student's tangent with central differences; what was found, as text, or None where none is taken.

    Raises:
        ValueError: the tangent is not the derivative of the network.
    """
    loss = config.loss
    if loss.objective != "scm" or loss.tangent != "jvp" or not loss.check_tangent:
        return None
    samples = list(range(len(CHECKED_TIMES)))
    _, x_t, condition = setup.real.rows(samples, trainer.device)
    t = torch.tensor(CHECKED_TIMES, device=trainer.device)
    check = check_denoiser_jvp(setup.student.denoiser, x_t, t, condition)
    return f"tangent against differences: off by {check.state.error:.1e} along x, {check.time.error:.1e} along t"
