"""What a consistency run is made of, built from the settings: teacher, student, data, and perhaps a fake score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.mcm.setup import McmParts, build_mcm
from fewstep.consistency.sana_sprint.setup import (
    TURNS,
    add_heads,
    build_sprint_student,
    check_control,
    check_sprint_teacher,
)
from fewstep.consistency.time_weight import build_time_weight
from fewstep.core.data import REAL_SEED, LatentDataset, LatentSource, PromptConditions, ToldPrompts, read_prompts
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.sana import sprint_times
from fewstep.core.export.schedulers import nearest_exportable_times
from fewstep.core.fake_score import FakeScore
from fewstep.core.families.attention_jvp import check_denoiser_jvp, use_jvp_attention
from fewstep.core.grids import step_grid
from fewstep.core.networks import build_fake_score, build_student_denoiser, load_weights
from fewstep.core.settings import DataConfig
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher, check_teacher_path
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer
from fewstep.core.two_time import add_second_time, holds_second_time

# Times and samples of the check before the first step: the middle of the path, and few samples.
CHECKED_TIMES = (0.3, 0.7)


@dataclass(frozen=True)
class ConsistencyData:
    """What is read from disk, before any network is loaded: a mistake here costs seconds."""

    prompts: tuple[str, ...]
    real: LatentDataset
    pictures: LatentDataset | None = None
    control: LatentDataset | None = None

    @classmethod
    def read(cls, config: ConsistencyConfig) -> ConsistencyData:
        """Read the files that the settings name. Raises ValueError that names a missing or broken one."""
        check_teacher_path(config.teacher.path)
        init = config.student.init
        if init is not None and not Path(init).is_file():
            raise ValueError(f"student.init {init} does not exist; give a .safetensors file of student weights")
        assert config.data.latents is not None
        shown = None if config.mcm is None else config.mcm.pictures
        pictures = None if shown is None else LatentDataset.load(shown)
        followed = None if config.sprint is None else config.sprint.control
        control = None if followed is None else LatentDataset.load(followed)
        return cls(read_prompts(config.data.prompts), LatentDataset.load(config.data.latents), pictures, control)


@dataclass(frozen=True)
class ConsistencySetup:
    """Everything the loop calls. `latent_shape` is (C, h, w), or (C, F, h, w) for videos.

    Fake score and its role match distributions; `heads_role` is the discriminator of sana_sprint, `weight_role` the
    learned weight of a time, which is trained in the steps of the student.
    """

    teacher: Teacher
    student: Student
    student_role: Role
    prompts: PromptConditions
    latent_shape: tuple[int, ...]
    real: LatentSource
    fake_score: FakeScore | None
    fake_role: Role | None
    heads_role: Role | None = None
    weight_role: Role | None = None
    mcm: McmParts | None = None


def build_setup(config: ConsistencyConfig, data: ConsistencyData, trainer: Trainer) -> ConsistencySetup:
    """Load the teacher, copy it into the student (and the fake score), and hand these to the trainer.

    Raises ValueError when a component or size does not fit, or the network has no tangent where one is needed.
    """
    teacher = Teacher.load(config.teacher.path, device=trainer.device, dtype=getattr(torch, config.teacher.dtype))
    shape = run_shape(config.data, data.real, teacher)
    if config.sprint is not None:
        check_sprint_teacher(teacher, controlled=data.control is not None)
        check_control(data.control, data.real)
    denoiser = build_student(config, teacher)
    if takes_tangent(config):
        try:
            use_jvp_attention(denoiser.network)
        except ValueError as error:
            raise ValueError(f"{error}: set loss.tangent to 'central'") from error
    grid = step_grid(config.student.steps, shift=config.student.shift)
    if config.sprint is not None:
        grid = sprint_times(config.student.steps)
    times = nearest_exportable_times(teacher.pipeline, grid)
    adversarial = config.sprint is not None and config.sprint.adversarial_weight > 0
    student_role = trainer.add_role(
        "student",
        denoiser,
        config.student.optimizer,
        ema_decay=config.student.ema_decay,
        ema_start=config.student.ema_start,
        every=TURNS if adversarial else 1,
    )
    fake_score = fake_role = None
    if config.fake_score is not None:
        fake_score = build_fake_score(config.fake_score, teacher, seed=config.run.seed, with_heads=False)
        fake_role = trainer.add_role("fake_score", fake_score, config.fake_score.optimizer)

    def embed(prompts: Sequence[str], control: LatentDataset | None = None) -> PromptConditions:
        return embedded_prompts(config, teacher, prompts, None if control is None else control.latents)

    mcm = None
    if config.mcm is not None:
        mcm = build_mcm(config, trainer, teacher=teacher, shape=shape, pictures=data.pictures, embed=embed)
    real = LatentSource(data.real, embed(data.real.prompts, data.control), config.run.seed + REAL_SEED)
    return ConsistencySetup(
        teacher=teacher,
        student=Student(denoiser, times, config.student.sampler),
        student_role=student_role,
        prompts=embed(data.prompts) if data.control is None else real.conditions,
        latent_shape=shape,
        real=real,
        fake_score=fake_score,
        fake_role=fake_role,
        heads_role=None if config.sprint is None else add_heads(config.sprint, teacher, trainer),
        weight_role=add_time_weight(config, trainer),
        mcm=mcm,
    )


def add_time_weight(config: ConsistencyConfig, trainer: Trainer) -> Role | None:
    """The role of the learned weight of a time, where one is configured."""
    if not config.loss.learned_weight:
        return None
    return trainer.add_role("time_weight", build_time_weight(config.run.seed), config.student.optimizer)


def embedded_prompts(
    config: ConsistencyConfig, teacher: Teacher, prompts: Sequence[str], control: Tensor | None
) -> PromptConditions:
    """The conditions of prompts; those of sana_sprint also tell the guidance, and what a ControlNet follows."""
    settings = config.data
    cache, height, width = settings.cache_prompts, settings.height, settings.width
    if config.sprint is None:
        return PromptConditions(teacher, prompts, cache=cache, height=height, width=width)
    guidance = config.teacher.guidance
    return ToldPrompts(teacher, prompts, cache=cache, height=height, width=width, guidance=guidance, control=control)


def run_shape(settings: DataConfig, real: LatentDataset, teacher: Teacher) -> tuple[int, ...]:
    """(C, h, w) or (C, F, h, w) of what the run makes. Raises ValueError where the data are of another shape."""
    shape = teacher.latent_shape(settings.height, settings.width, frames=settings.frames)
    found = tuple(real.latents.shape[1:])
    if found != shape:
        raise ValueError(
            f"data.latents holds latents of shape {found}, this run makes {shape}; set data.height/width, and "
            "data.frames for videos"
        )
    return shape


def takes_tangent(config: ConsistencyConfig) -> bool:
    """Whether this run differentiates its student in forward mode."""
    return config.loss.objective not in ("dcm", "ect") and config.loss.tangent == "jvp"


def build_student(config: ConsistencyConfig, teacher: Teacher) -> Denoiser:
    """A trainable fp32 copy of the teacher's network, with a second time and adapters where they are configured.

    `student.init` may be a file of a network of one time or of two. Layers of the second time are trained beside
    adapters.
    """
    settings, seed = config.student, config.run.seed
    if config.sprint is not None:
        return build_sprint_student(settings, teacher)
    if config.second_time == "none":
        return build_student_denoiser(settings, teacher, seed=seed)
    one_time = settings.init is None or not holds_second_time(settings.init)
    denoiser = build_student_denoiser(replace(settings, init=settings.init if one_time else None), teacher, seed=seed)
    add_second_time(denoiser.network, config.second_time)
    if not one_time:
        assert settings.init is not None
        if settings.lora_rank > 0:
            raise ValueError(
                "student.init holds a network of two times, which cannot start adapters; train all weights"
            )
        load_weights(denoiser, settings.init)
    return denoiser


def check_tangent(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> str | None:
    """Compare the student's tangent with central differences; what was found, as text, or None where none is taken.

    Raises:
        ValueError: the tangent is not the derivative of the network.
    """
    if not takes_tangent(config) or not config.loss.check_tangent:
        return None
    samples = list(range(len(CHECKED_TIMES)))
    _, x_t, condition = setup.real.rows(samples, trainer.device)
    t = torch.tensor(CHECKED_TIMES, device=trainer.device)
    r = None if config.second_time == "none" else t / 2
    check = check_denoiser_jvp(setup.student.denoiser, x_t, t, condition, r=r)
    return f"tangent against differences: off by {check.state.error:.1e} along x, {check.time.error:.1e} along t"
