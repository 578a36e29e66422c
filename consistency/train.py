"""The training loop of consistency and flow map students: alone, with distribution matching, or with a discriminator.

The second is rCM's and AnyFlow's, the third SANA-Sprint's and MCM's, whose step is in `mcm_train.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from fewstep.consistency.batch import ConsistencyTurn, Networks, Noised, noise_data
from fewstep.consistency.config import FLOW_MAPS, ConsistencyConfig, ConsistencyLossConfig
from fewstep.consistency.mcm.train import train_mcm_step
from fewstep.consistency.methods.alphaflow import alpha_schedule, alphaflow_turn
from fewstep.consistency.methods.anyflow import anyflow_turn, backward_simulation, simulate
from fewstep.consistency.methods.dcm import dcm_turn
from fewstep.consistency.methods.ect import ect_turn
from fewstep.consistency.methods.flow_map import draw_pair, flow_batch
from fewstep.consistency.methods.meanflow import meanflow_turn
from fewstep.consistency.methods.scm import scm_turn
from fewstep.consistency.sana_sprint.setup import TURNS
from fewstep.consistency.sana_sprint.step import SprintNetworks, sprint_discriminator_turn, sprint_student_turn
from fewstep.consistency.setup import ConsistencyData, ConsistencySetup, build_setup, check_tangent
from fewstep.consistency.times import TimePair, grid_times
from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role, frozen
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import Watch, run_text
from fewstep.dmd.matching import fake_score_turn, student_turn


def train_consistency(config: ConsistencyConfig) -> int:
    """Train a student; returns the exit code (0, or 128 + signal after SIGTERM or Ctrl-C, with a checkpoint written).

    Without `loss.dmd_weight` every step is the student's. With it (rCM, arXiv:2510.08431; AnyFlow's second stage,
    arXiv:2605.13724), from step `loss.dmd_start` on, every `updates_per_student_update`-th step is the student's, on
    the sum of both losses, and the others are the fake score's. With `sprint` (SANA-Sprint, arXiv:2503.09641) student
    and discriminator take turns, each with fresh samples.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
    """
    data = ConsistencyData.read(config)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        setup = build_setup(config, data, trainer)
        watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
        notes = (partial(describe_run, config, setup, trainer), partial(check_tangent, config, setup, trainer))
        for _ in run.steps(watch, *notes):
            run.finish_step(train_step(config, setup, trainer))
    return run.exit_code


def describe_run(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, and parameters and memory of each network, as text."""
    told = f"steps at t = {setup.student.grid_text}; latents {setup.latent_shape}; "
    told += f"{len(setup.real.dataset.prompts)} data, {len(setup.prompts)} prompts"
    return run_text(config, trainer, told, frozen={"teacher": setup.teacher.denoiser})


def train_step(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> dict[str, float | Tensor]:
    """One step of the student, the fake score or the discriminator; of student and discriminator for mcm.

    Returns its metrics.
    """
    if config.mcm is not None:
        return train_mcm_step(config, setup, trainer)
    matching = config.fake_score is not None and trainer.step >= config.loss.dmd_start
    role = role_due(config, setup, trainer.step)
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
                continue
            if role is setup.heads_role:
                records.append(discriminator_backward(config, setup, trainer, draw=draw))
                continue
            record = consistency_backward(config, setup, trainer, draw=draw)
            if matching:
                record |= matching_backward(config, setup, trainer, draw=draw)
            records.append(record)
    metrics: dict[str, float | Tensor] = {**mean_records(records)}
    for each in learning:
        metrics[f"{each.name.removesuffix('_score')}_grad_norm"] = trainer.update(each)
    return metrics


def role_due(config: ConsistencyConfig, setup: ConsistencySetup, step: int) -> Role:
    """The network that learns in this step."""
    if setup.heads_role is not None:
        return setup.student_role if step % TURNS == 0 else setup.heads_role
    if config.fake_score is None or setup.fake_role is None or step < config.loss.dmd_start:
        return setup.student_role
    place = (step - config.loss.dmd_start) % config.fake_score.updates_per_student_update
    return setup.student_role if place == 0 else setup.fake_role


def noised_slice(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> Noised:
    """One slice of data with its noise and random times."""
    _, x0, condition = setup.real.rows(draw.indices, trainer.device)
    return noise_data(
        x0,
        condition,
        draw=draw,
        loss=config.loss,
        first_time=setup.student.times[0],
        step=trainer.step,
        progress=trainer.step / config.run.steps,
    )


def consistency_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of the consistency loss for one slice of data; returns what to log."""
    noised = noised_slice(config, setup, trainer, draw=draw)
    role, teacher = setup.student_role, setup.teacher
    if config.sprint is not None:
        heads = None if setup.heads_role is None else setup.heads_role.module
        judged = SprintNetworks(role.module, role.wrapped, teacher, heads)
        turn = sprint_student_turn(noised, judged, draw=draw, loss=config.loss, sprint=config.sprint)
    else:
        weight = None if setup.weight_role is None else setup.weight_role.wrapped
        networks = Networks(role.module, role.wrapped, teacher, config.teacher.guidance, weight)
        mean = trainer.mean_over_ranks
        turn = consistency_turn(noised, networks, draw=draw, loss=config.loss, mean_over_processes=mean)
    trainer.check_finite("consistency loss", turn.loss)
    trainer.backward(turn.loss)
    return {"consistency_loss": turn.loss.detach(), **turn.record}


def student_samples(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> Tensor:
    """The student's x0 [B, C, h, w] on prompts, with a graph where gradients are on.

    The step with the gradient is drawn from (seed, step) alone, so all processes stop there and build the same graph.
    """
    condition = setup.prompts.of_samples(draw.indices, config.run.seed)
    if setup.student.sampler == "flow_map":
        return flow_map_samples(config, setup, trainer, draw=draw, condition=condition)
    grad_step = shared_integer(config.run.seed, trainer.step, "grad_step", len(setup.student.times))
    renoise = [draw.noise(setup.latent_shape, f"renoise_{step}") for step in range(grad_step)]
    wrapped = setup.student_role.wrapped if torch.is_grad_enabled() else None
    return setup.student.rollout(draw.noise(setup.latent_shape, "noise"), condition, renoise, grad_step, wrapped).x0


def flow_map_samples(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw, condition: Condition
) -> Tensor:
    """x0 [B, C, h, w] at the end of a rollout of a random number of steps, in three jumps at most (AnyFlow).

    A random segment of the rollout is trained; the jumps after it carry the gradient and do not learn from it, which is
    one forward with a graph for the weights whatever the length (the public code trains all three).
    """
    choices, seed = config.loss.rollout_steps, config.run.seed
    steps = choices[shared_integer(seed, trainer.step, "rollout_steps", len(choices))]
    segment = shared_integer(seed, trainer.step, "rollout_segment", steps)
    role = setup.student_role
    trained = role.wrapped if torch.is_grad_enabled() else role.module

    def jump(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return trained(x_t, t, condition, r)

    def frozen_jump(x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        with frozen(role.module):
            return role.module(x_t, t, condition, r)

    jumps = backward_simulation(steps, segment, shift=config.student.shift)
    return simulate(jump, draw.noise(setup.latent_shape, "noise"), jumps, frozen=frozen_jump)


def matching_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of lambda times the distribution matching loss for one slice; returns what to log."""
    assert setup.fake_score is not None
    x0 = student_samples(config, setup, trainer, draw=draw)
    with frozen(setup.fake_score):
        turn = student_turn(
            x0,
            setup.prompts.of_samples(draw.indices, config.run.seed),
            teacher=setup.teacher,
            fake_score=setup.fake_score,
            guidance=config.teacher.guidance,
            loss=config.matching,
            draw=draw,
        )
        trainer.check_finite("matching loss", turn.loss)
        # The loss of DMD carries a factor 1/2 that rCM's does not.
        trainer.backward(2.0 * config.loss.dmd_weight * turn.loss)
    return {"matching_loss": turn.loss.detach(), **turn.log()}


def fake_score_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the fake score's gradients for one slice, on fresh samples of the student; returns what to log."""
    assert setup.fake_role is not None
    with torch.no_grad():
        x0 = student_samples(config, setup, trainer, draw=draw)
    condition = setup.prompts.of_samples(draw.indices, config.run.seed)
    turn = fake_score_turn(
        x0, condition, fake_score=setup.fake_role.wrapped, loss=config.matching, draw=draw, real=None
    )
    trainer.check_finite("fake score loss", turn.loss)
    trainer.backward(turn.loss)
    return {"fake_score_loss": turn.flow_loss.detach()}


def discriminator_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of the discriminator's heads for one slice, on fresh samples; returns what to log."""
    assert config.sprint is not None
    assert setup.heads_role is not None
    student = setup.student_role
    networks = SprintNetworks(student.module, student.wrapped, setup.teacher, setup.heads_role.wrapped)
    noised = noised_slice(config, setup, trainer, draw=draw)
    turn = sprint_discriminator_turn(noised, networks, draw=draw, sprint=config.sprint)
    trainer.check_finite("discriminator loss", turn.loss)
    trainer.backward(turn.loss)
    return turn.record


def flow_map_turn(
    noised: Noised,
    pair: TimePair,
    networks: Networks,
    *,
    draw: Draw,
    loss: ConsistencyLossConfig,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ConsistencyTurn:
    """The loss of the configured flow map on one batch, noised to the t of `pair`.

    Raises:
        ValueError: some r exceeds its t, or AnyFlow finds no sample with r = t.
    """
    if bool((pair.r > pair.t).any()):
        raise ValueError("a flow map goes from t down to r: give pairs with r <= t (0 is data, 1 is noise)")
    batch = flow_batch(noised, pair, networks, draw=draw, loss=loss)
    if loss.objective == "anyflow":
        return anyflow_turn(batch, networks, loss, data=noised.eps - noised.x0, mean=mean_over_processes)
    if loss.objective == "alphaflow":
        alpha = alpha_schedule(noised.progress, start=loss.alpha_start, end=loss.alpha_end)
        if alpha > 0:
            return alphaflow_turn(batch, networks, loss, alpha=alpha)
    return meanflow_turn(batch, networks, loss)


def consistency_turn(
    noised: Noised,
    networks: Networks,
    *,
    draw: Draw,
    loss: ConsistencyLossConfig,
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach,
) -> ConsistencyTurn:
    """The loss that is configured, on one batch. `mean_over_processes` averages a tensor over the run's processes."""
    if loss.objective in FLOW_MAPS:
        pair = draw_pair(noised, draw, loss)
        return flow_map_turn(noised, pair, networks, draw=draw, loss=loss, mean_over_processes=mean_over_processes)
    if loss.objective == "dcm":
        uniform = draw.uniform("consistency_grid")
        return dcm_turn(noised, networks, grid_times(uniform, steps=loss.grid_steps, shift=loss.grid_shift))
    if loss.objective == "ect":
        return ect_turn(noised, networks, loss)
    return scm_turn(noised, networks, loss)
