"""The training loop of consistency and flow map students: alone, with distribution matching, or with a discriminator.

The second is rCM's and AnyFlow's (`methods/rcm.py`), the third SANA-Sprint's; MCM's step is in `mcm/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks, random_times
from fewstep.consistency.config import ConsistencyConfig, FlowMapSettings
from fewstep.consistency.mcm.config import McmConfig
from fewstep.consistency.mcm.step import train_mcm_step
from fewstep.consistency.methods.alphaflow import alphaflow_step
from fewstep.consistency.methods.anyflow import anyflow_step
from fewstep.consistency.methods.dcm import dcm_step, grid_pair
from fewstep.consistency.methods.dmf import dmf_step
from fewstep.consistency.methods.ect import ect_step
from fewstep.consistency.methods.flow_map import draw_pair
from fewstep.consistency.methods.imf import imf_step
from fewstep.consistency.methods.meanflow import meanflow_step
from fewstep.consistency.methods.pairs import pairs_step
from fewstep.consistency.methods.rcm import fake_score_backward, is_students_step, matching_backward
from fewstep.consistency.methods.scm import scm_step
from fewstep.consistency.sana_sprint.config import SprintConfig
from fewstep.consistency.sana_sprint.setup import CYCLE
from fewstep.consistency.sana_sprint.step import sprint_discriminator_step, sprint_noised, sprint_student_step
from fewstep.consistency.sections import (
    AlphaflowConfig,
    AnyflowConfig,
    DcmConfig,
    DmfConfig,
    EctConfig,
    ImfConfig,
    MeanflowConfig,
    PairsConfig,
    ScmConfig,
)
from fewstep.consistency.setup import ConsistencyData, ConsistencySetup, build_setup
from fewstep.consistency.tangent_check import check_tangent
from fewstep.core.randomness import Draw
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import Watch, run_text
from fewstep.dmd.config import matching_at
from fewstep.dmd.validation import build_validation, check_validation, rehearsal, watched


def train_consistency(config: ConsistencyConfig) -> int:
    """Train a student; returns the exit code (0, or 128 + signal after SIGTERM or Ctrl-C, with a checkpoint written).

    Without the section `matching` every step is the student's. With it (rCM, arXiv:2510.08431; AnyFlow's second stage,
    arXiv:2605.13724), from step `matching.start` on, the first of `ratio + 1` steps is the student's, on
    the sum of both losses, and the others are the fake score's. With `sana_sprint` (arXiv:2503.09641) steps of student
    and discriminator alternate, each with fresh samples.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
    """
    check_validation(config.validation)
    data = ConsistencyData.read(config)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        setup = build_setup(config, data, trainer)
        validation = build_validation(config.validation, config.data, setup, trainer)
        setup.teacher.free_after_setup(config.data)
        watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
        watch = watched(watch, validation)
        notes = (partial(describe_run, config, setup, trainer), partial(check_tangent, config, setup, trainer))
        notes = (*notes, partial(rehearsal, validation, dry=config.run.dry_run))
        for _ in run.steps(watch, *notes, beside=config.student_settings.save):
            run.finish_step(train_step(config, setup, trainer))
    return run.exit_code


def describe_run(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, and parameters and memory of each network, as text."""
    text = f"steps at t = {setup.student.grid_text}; latents {setup.latent_shape}; "
    text += f"{len(setup.real.dataset.prompts)} data, {len(setup.prompts)} prompts"
    return run_text(config, trainer, text, frozen={"teacher": setup.teacher.denoiser})


def train_step(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> dict[str, float | Tensor]:
    """One step of the student, the fake score or the discriminator; of student and discriminator for mcm.

    Returns its metrics.
    """
    if isinstance(config.settings, McmConfig):
        return train_mcm_step(config, setup, trainer)
    config = matching_at(config, setup.student_role.updates)
    role = role_due(config, setup, trainer.step)
    # The learned weight of a time belongs to the student's loss, so it learns in the student's steps.
    learning = [role] if role is not setup.student_role else [role, *filter(None, [setup.weight_role])]
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    records: list[dict[str, Tensor]] = []
    for number, indices in enumerate(slices):
        draw = Draw(config.run.seed, indices, trainer.device)
        with ExitStack() as stack:
            for each in learning:
                stack.enter_context(trainer.sync(each, number == len(slices) - 1))
            if role is setup.fake_role:
                records.append(fake_score_backward(config, setup, trainer, draw=draw))
            elif role is setup.heads_role:
                records.append(discriminator_backward(config, setup, trainer, draw=draw))
            else:
                records.append(student_backward(config, setup, trainer, draw=draw))
    metrics: dict[str, float | Tensor] = {**mean_records(records)}
    for each in learning:
        metrics[f"{each.name.removesuffix('_score')}_grad_norm"] = trainer.update(each)
    return metrics


def role_due(config: ConsistencyConfig, setup: ConsistencySetup, step: int) -> Role:
    """The network that learns in this step."""
    if setup.heads_role is not None:
        return setup.student_role if step % CYCLE == 0 else setup.heads_role
    if config.matching is None or config.fake_score is None or setup.fake_role is None:
        return setup.student_role
    cycle = config.fake_score.ratio + 1
    return setup.student_role if is_students_step(config.matching, cycle, step) else setup.fake_role


def data_slice(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> DataBatch:
    """One slice of data with its noise."""
    rows, x0, condition = setup.real.rows(draw.indices, trainer.device)
    if config.pairs is None:
        eps = draw.noise(tuple(x0.shape[1:]), "consistency_noise")
    else:
        eps = setup.real.noise(rows, trainer.device)
    progress = trainer.step / config.run.steps
    return DataBatch(x0, eps, condition, draw, trainer.step, progress, first_time=setup.student.times[0])


def student_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the student's gradients for one slice of data; returns what to log."""
    data, settings, role = data_slice(config, setup, trainer, draw=draw), config.settings, setup.student_role
    assert not isinstance(settings, McmConfig)
    networks = Networks(
        student=role.module,
        wrapped=role.wrapped,
        teacher=setup.teacher,
        guidance=config.teacher.guidance,
        time_weight=None if setup.weight_role is None else setup.weight_role.wrapped,
        heads=None if setup.heads_role is None else setup.heads_role.module,
    )
    if isinstance(settings, PairsConfig):
        assert setup.distance is not None
        x0 = setup.student.rollout(data.eps, data.condition, (), 0, role.wrapped).x0
        step = pairs_step(x0, data.x0, setup.distance)
    else:
        step = consistency_step(data, networks, settings, mean_over_processes=trainer.mean_over_ranks)
    trainer.check_finite("consistency loss", step.loss)
    trainer.backward(step.loss)
    record = {"consistency_loss": step.loss.detach(), **step.record}
    if config.matching is not None and trainer.step >= config.matching.start:
        record |= matching_backward(config, setup, trainer, draw=draw)
    return record


def consistency_step(
    data: DataBatch,
    networks: Networks,
    settings: ScmConfig | DcmConfig | EctConfig | FlowMapSettings | SprintConfig,
    *,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ConsistencyStep:
    """The loss of the method on one slice of data; `mean_over_processes` averages a tensor over the run's processes."""
    match settings:
        case ScmConfig():
            return scm_step(data.at(random_times(data, settings)), networks, settings)
        case DcmConfig():
            return dcm_step(data, grid_pair(data.draw, settings), networks)
        case EctConfig():
            return ect_step(data.at(random_times(data, settings)), networks, settings)
        case MeanflowConfig():
            return meanflow_step(data, draw_pair(data, settings), networks, settings)
        case ImfConfig():
            return imf_step(data, draw_pair(data, settings), networks, settings)
        case AlphaflowConfig():
            return alphaflow_step(data, draw_pair(data, settings), networks, settings)
        case DmfConfig():
            return dmf_step(data, draw_pair(data, settings), networks, settings)
        case AnyflowConfig():
            pair = draw_pair(data, settings)
            return anyflow_step(data, pair, networks, settings, mean_over_processes=mean_over_processes)
        case SprintConfig():
            return sprint_student_step(sprint_noised(data, settings), networks, draw=data.draw, sprint=settings)


def discriminator_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of SANA-Sprint's heads for one slice, on fresh samples; returns what to log."""
    assert config.sana_sprint is not None
    assert setup.heads_role is not None
    student, guidance = setup.student_role, config.teacher.guidance
    networks = Networks(student.module, student.wrapped, setup.teacher, guidance, heads=setup.heads_role.wrapped)
    noised = sprint_noised(data_slice(config, setup, trainer, draw=draw), config.sana_sprint)
    step = sprint_discriminator_step(noised, networks, draw=draw, sprint=config.sana_sprint)
    trainer.check_finite("discriminator loss", step.loss)
    trainer.backward(step.loss)
    return step.record
