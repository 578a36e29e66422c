"""One step of MCM (arXiv:2406.06890): the student with its motion head, then the discriminator on the same samples."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from fewstep.consistency.batch import Networks
from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.mcm.step import (
    Judged,
    McmStep,
    drawn_frames,
    mcm_discriminator_step,
    mcm_noised,
    mcm_student_step,
    require_discriminator,
)
from fewstep.consistency.methods.dcm import grid_pair
from fewstep.consistency.setup import ConsistencySetup
from fewstep.core.paths import at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role
from fewstep.core.training.trainer import Trainer


def train_mcm_step(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> dict[str, float | Tensor]:
    """Update student and motion head, then the discriminator, which sees the samples from before the update.

    Returns the step's metrics.
    """
    assert setup.mcm is not None
    motion, heads = setup.mcm.motion_role, setup.mcm.heads_role
    learning = [role for role in (setup.student_role, motion) if role is not None]
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    draws = [Draw(config.run.seed, indices, trainer.device) for indices in slices]
    steps: list[McmStep] = []
    for number, draw in enumerate(draws):
        with ExitStack() as stack:
            for role in learning:
                stack.enter_context(trainer.sync(role, number == len(slices) - 1))
            steps.append(student_backward(config, setup, trainer, draw=draw))
    metrics: dict[str, float | Tensor] = {**mean_records([step.record for step in steps])}
    for role in learning:
        metrics[f"{role.name}_grad_norm"] = trainer.update(role)
    if heads is None:
        return metrics
    records = []
    for number, (draw, step) in enumerate(zip(draws, steps, strict=True)):
        with trainer.sync(heads, number == len(slices) - 1):
            records.append(heads_backward(config, setup, trainer, heads, samples=step.samples, draw=draw))
    return {**metrics, **mean_records(records), "heads_grad_norm": trainer.update(heads)}


def student_backward(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> McmStep:
    """Add the gradients of student and motion head for one slice of data."""
    assert config.mcm is not None
    assert setup.mcm is not None
    role, mcm = setup.student_role, config.mcm
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    data = (at_least_fp32(x0), condition)
    times = grid_pair(draw, mcm)
    noised = mcm_noised(data, role.module, times, draw=draw, mcm=mcm, step=trainer.step)
    networks = Networks(role.module, role.wrapped, setup.teacher, config.teacher.guidance)
    roles = (setup.mcm.motion_role, setup.mcm.heads_role)
    step = mcm_student_step(noised, times, networks, roles, draw=draw, mcm=mcm)
    trainer.check_finite("consistency loss", step.loss)
    trainer.backward(step.loss)
    return McmStep(step.loss.detach(), {"consistency_loss": step.loss.detach(), **step.record}, step.samples)


def heads_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, heads: Role, *, samples: Tensor, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of the discriminator's heads for one slice; returns what to log."""
    assert config.mcm is not None
    assert setup.mcm is not None
    settings = require_discriminator(config.mcm)
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    if setup.mcm.pictures is None:
        real = drawn_frames(at_least_fp32(x0), condition, draw=draw, count=settings.frames, stream="mcm_real")
    else:
        _, pictures, captions = setup.mcm.pictures.rows(draw.indices, trainer.device)
        real = Judged(at_least_fp32(pictures), captions)
    step = mcm_discriminator_step(
        samples, condition, real, heads.wrapped, teacher=setup.teacher, draw=draw, settings=settings
    )
    trainer.check_finite("discriminator loss", step.loss)
    trainer.backward(step.loss)
    return step.record
