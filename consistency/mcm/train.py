"""One step of MCM (arXiv:2406.06890): the student with its motion head, then the discriminator on the same samples."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from fewstep.consistency.batch import Networks
from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.mcm.step import (
    Judged,
    McmTurn,
    drawn_frames,
    mcm_discriminator_turn,
    mcm_noised,
    mcm_student_turn,
)
from fewstep.consistency.setup import ConsistencySetup
from fewstep.consistency.times import grid_times
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
    turns: list[McmTurn] = []
    for number, draw in enumerate(draws):
        with ExitStack() as stack:
            for role in learning:
                stack.enter_context(trainer.sync(role, number == len(slices) - 1))
            turns.append(student_backward(config, setup, trainer, draw=draw))
    metrics: dict[str, float | Tensor] = {**mean_records([turn.record for turn in turns])}
    for role in learning:
        metrics[f"{role.name}_grad_norm"] = trainer.update(role)
    if heads is None:
        return metrics
    records = []
    for number, (draw, turn) in enumerate(zip(draws, turns, strict=True)):
        with trainer.sync(heads, number == len(slices) - 1):
            records.append(heads_backward(config, setup, trainer, heads, samples=turn.samples, draw=draw))
    return {**metrics, **mean_records(records), "heads_grad_norm": trainer.update(heads)}


def student_backward(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> McmTurn:
    """Add the gradients of student and motion head for one slice of data."""
    assert config.mcm is not None
    assert setup.mcm is not None
    role, loss, mcm = setup.student_role, config.loss, config.mcm
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    data = (at_least_fp32(x0), condition)
    times = grid_times(draw.uniform("consistency_grid"), steps=loss.grid_steps, shift=loss.grid_shift)
    noised = mcm_noised(data, role.module, times, draw=draw, mcm=mcm, step=trainer.step)
    networks = Networks(role.module, role.wrapped, setup.teacher, config.teacher.guidance)
    roles = (setup.mcm.motion_role, setup.mcm.heads_role)
    turn = mcm_student_turn(noised, networks, roles, times, draw=draw, mcm=mcm)
    trainer.check_finite("consistency loss", turn.loss)
    trainer.backward(turn.loss)
    return McmTurn(turn.loss.detach(), {"consistency_loss": turn.loss.detach(), **turn.record}, turn.samples)


def heads_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, heads: Role, *, samples: Tensor, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of the discriminator's heads for one slice; returns what to log."""
    assert config.mcm is not None
    assert setup.mcm is not None
    mcm = config.mcm
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    if setup.mcm.pictures is None:
        real = drawn_frames(at_least_fp32(x0), condition, draw=draw, mcm=mcm, stream="mcm_real")
    else:
        _, pictures, captions = setup.mcm.pictures.rows(draw.indices, trainer.device)
        real = Judged(at_least_fp32(pictures), captions)
    turn = mcm_discriminator_turn(samples, condition, real, heads.wrapped, teacher=setup.teacher, draw=draw, mcm=mcm)
    trainer.check_finite("discriminator loss", turn.loss)
    trainer.backward(turn.loss)
    return turn.record
