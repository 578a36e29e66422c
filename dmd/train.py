"""The training loop of distribution matching distillation (DMD2, arXiv:2405.14867, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role, frozen, inject_student
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import Watch, run_text
from fewstep.dmd.config import DmdConfig, matching_at
from fewstep.dmd.loss import regression_loss
from fewstep.dmd.matching import (
    SampleWeights,
    Scores,
    drawn_guidance,
    fake_score_step,
    heads_step,
    student_step,
    telling,
)
from fewstep.dmd.setup import DmdData, DmdSetup, build_setup
from fewstep.dmd.validation import build_validation, check_validation, rehearsal, watched
from fewstep.evaluation.scorers.failure import keeping_failures
from fewstep.evaluation.scorers.scorer import Scorer

# Of the integers that decide whether a step's input is noised data.
INPUT_PARTS = 10**6


@dataclass(frozen=True)
class Batch:
    """One slice of a step: the student's samples x0 [B, C, h, w] without graph, on which fake score and discriminator
    learn, their condition, random numbers, and exits where the fake score is told (`Samples`)."""

    x0: Tensor
    condition: Condition
    draw: Draw
    exits: Tensor | None


@dataclass(frozen=True, eq=False)
class Samples:
    """The student's samples of one slice.

    Attributes:
        x0: [B, C, h, w], with a graph where gradients are on.
        condition: of them.
        shown: what the fake score learns on: x0, but for inputs of the student's own samples.
        exits: int64 [B], the step at which each stopped.
    """

    x0: Tensor
    condition: Condition
    shown: Tensor
    exits: Tensor


def train_dmd(config: DmdConfig, *, scorers: Sequence[Scorer] | None = None) -> int:
    """Train a student; returns the exit code (0, or 128 + signal after SIGTERM or Ctrl-C, with a checkpoint written).

    Each step rolls the student out on noise. Every `ratio`-th step the student is updated, and in
    every step the fake score is, on the same samples. For several student steps the input of the gradient step is what
    the student itself produces (backward simulation), up to a step drawn at random and shared by all processes.
    `scorers` take the place of those that `refl.scorers` names.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
        RewardError: a scorer failed; the step's start is saved first.
    """
    check_validation(config.validation)
    data = DmdData.read(config)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        setup = build_setup(config, data, trainer, scorers=scorers)
        validation = build_validation(config.validation, config.data, setup, trainer)
        setup.teacher.free_after_setup(config.data)
        watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
        watch = watched(watch, validation)
        notes = (partial(describe_run, config, setup, trainer), partial(rehearsal, validation, dry=config.run.dry_run))
        for _ in run.steps(watch, *notes, beside=config.student_settings.save):
            with keeping_failures(run):
                run.finish_step(train_step(config, setup, trainer))
    return run.exit_code


def describe_run(config: DmdConfig, setup: DmdSetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, and parameters and memory of each network, as text."""
    ratio = config.fake_score.ratio
    told = f"steps at t = {setup.student.grid_text} ({setup.student.sampler}); latents {setup.latent_shape}; "
    told += f"{ratio} fake-score updates per student update; {len(setup.prompts)} prompts"
    return run_text(config, trainer, told, frozen={"teacher": setup.teacher.denoiser})


def train_step(config: DmdConfig, setup: DmdSetup, trainer: Trainer) -> dict[str, float | Tensor]:
    """One step: the student's when it is due, then the fake score's, on the same samples. Returns its metrics."""
    config = matching_at(config, setup.student_role.updates)
    student_due = trainer.step % config.fake_score.ratio == 0
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    batches: list[Batch] = []
    records: list[dict[str, Tensor]] = []
    for number, indices in enumerate(slices):
        draw = Draw(config.run.seed, indices, trainer.device)
        condition = setup.prompts.of_samples(indices, config.run.seed)
        # Steps of the fake score alone roll out without a graph: their samples are only data.
        with trainer.sync(setup.student_role, number == len(slices) - 1), torch.set_grad_enabled(student_due):
            samples = student_samples(config, setup, trainer, condition=condition, draw=draw)
            if student_due:
                records.append(student_backward(config, setup, trainer, samples=samples, draw=draw))
        exits = samples.exits if config.fake_score.told_exit else None
        batches.append(Batch(samples.shown.detach(), samples.condition, draw, exits))
    metrics: dict[str, float | Tensor] = {**mean_records(records)}
    if student_due:
        metrics["student_grad_norm"] = trainer.update(setup.student_role)
        if config.fake_score.student_share > 0:
            follow_student(setup, share=config.fake_score.student_share)

    # On the samples from before the update: the fake score follows the distribution that they were drawn from, and a
    # second rollout would cost as much as the step.
    records = []
    for number, batch in enumerate(batches):
        with trainer.sync(setup.fake_role, number == len(batches) - 1):
            records.append(fake_score_backward(config, setup, trainer, batch=batch))
    metrics |= mean_records(records)
    metrics["fake_grad_norm"] = trainer.update(setup.fake_role)
    if setup.heads_role is not None:
        metrics |= heads_update(config, setup, trainer, setup.heads_role, batches)
    return metrics


def follow_student(setup: DmdSetup, *, share: float) -> None:
    """Move the fake score's trunk towards the student (SenseFlow's implicit distribution alignment)."""
    prefix = "denoiser."
    trunk = {name.removeprefix(prefix): p for name, p in setup.fake_role.parameters if name.startswith(prefix)}
    student = dict(setup.student_role.parameters)
    inject_student([trunk[name] for name in student], student.values(), decay=1 - share)


def student_samples(
    config: DmdConfig, setup: DmdSetup, trainer: Trainer, *, condition: Condition, draw: Draw
) -> Samples:
    """The student's samples for one slice, with a graph where gradients are on.

    The step with the gradient is drawn from (seed, step) alone, so all processes stop there and build the same graph.
    Its input is what the student's own steps before led to; or, where these are configured, noised real data or noised
    samples of its own, each at a step drawn for it.
    """
    grad_step = shared_integer(config.run.seed, trainer.step, "grad_step", len(setup.student.times))
    noise = draw.noise(setup.latent_shape, "noise")
    renoise = [draw.noise(setup.latent_shape, f"renoise_{step}") for step in range(grad_step)]
    # The distributed wrapper is for calls whose gradients are averaged; the others go to the bare network.
    wrapped = setup.student_role.wrapped if torch.is_grad_enabled() else None
    if takes_noised_data(config, trainer.step):
        if setup.inputs is not None:
            _, clean, condition = setup.inputs.rows(draw.indices, trainer.device)
        else:
            clean = whole_samples(setup, condition, draw)
            if not torch.is_grad_enabled():
                last = torch.full((len(clean),), len(setup.student.times) - 1)
                return Samples(clean, condition, clean, last)
            noise = draw.noise(setup.latent_shape, "input_noise")
        # There is no rollout that all processes would have to leave at one step: each sample has its own.
        times = torch.tensor(setup.student.times, device=trainer.device)
        place = (draw.uniform("noised_data_time") * len(times)).long().clamp(max=len(times) - 1)
        t = times[place.to(times.device)]
        x_t = add_noise(clean, noise, t)
        called = setup.student.denoiser if wrapped is None else wrapped
        x0 = x0_from_velocity(x_t, called(x_t, t, condition), t)
        return Samples(x0, condition, x0 if setup.inputs is not None else clean, place)
    x0 = setup.student.rollout(noise, condition, renoise, grad_step, wrapped).x0
    return Samples(x0, condition, x0, torch.full((len(x0),), grad_step))


def takes_noised_data(config: DmdConfig, step: int) -> bool:
    """Whether a step's input is noised data: drawn from (seed, step) alone, the same in every process."""
    if config.noised_data is None:
        return False
    chosen = shared_integer(config.run.seed, step, "noised_data", INPUT_PARTS)
    return chosen < config.noised_data.share * INPUT_PARTS


def texts_of_samples(config: DmdConfig, setup: DmdSetup, draw: Draw, step: int) -> list[str]:
    """What the samples of a slice were asked for, as `student_samples` chooses it."""
    if setup.inputs is not None and takes_noised_data(config, step):
        return setup.inputs.captions(draw.indices)
    return setup.prompts.texts_of_samples(draw.indices, config.run.seed)


@torch.no_grad()
def whole_samples(setup: DmdSetup, condition: Condition, draw: Draw) -> Tensor:
    """What the student's sampler makes of noise, all steps of it."""
    renoise = [draw.noise(setup.latent_shape, f"renoise_{step}") for step in range(len(setup.student.times) - 1)]
    return setup.student.sample(draw.noise(setup.latent_shape, "noise"), condition, renoise)


def student_backward(
    config: DmdConfig, setup: DmdSetup, trainer: Trainer, *, samples: Samples, draw: Draw
) -> dict[str, Tensor]:
    """Add the student's gradients for one slice; returns what to log."""
    x0, exits = samples.x0, samples.exits if config.fake_score.told_exit else None
    # Gradients may pass through the fake score to x0 (SiD, GAN), but must not be left on its weights.
    judge = setup.judge
    with frozen(setup.fake_score), nullcontext() if judge is None else frozen(judge.heads):
        guidance = drawn_guidance(config.matching, config.teacher, draw)
        real = setup.teacher if setup.blended is None else setup.blended.teacher(setup.student_role.updates)
        step = student_step(
            x0,
            samples.condition,
            scores=Scores(real, setup.fake_score, guidance, judge, exits),
            draw=draw,
            times=config.matching,
            objective=config.objective,
            gan=config.gan,
            samples=SampleWeights(mean_over_processes=trainer.mean_over_ranks),
        )
        loss, judged = step.loss, {}
        if setup.reward is not None:
            prompts = texts_of_samples(config, setup, draw, trainer.step)
            refl, judged = setup.reward.loss(setup.teacher, x0, prompts)
            loss, judged = loss + refl, {"refl_loss": refl.detach(), **judged}
        trainer.check_finite("student loss", loss)
        trainer.backward(loss)
    record = {"student_loss": loss.detach(), **step.log(), **judged}
    if setup.pairs is not None:
        assert config.regression is not None
        rows, target, pair_condition = setup.pairs.rows(draw.indices, trainer.device)
        noise = setup.pairs.noise(rows, trainer.device)
        # A second call of the wrapper, with a backward of its own: the graphs of both need not be held at once.
        paired = setup.student.rollout(noise, pair_condition, (), 0, setup.student_role.wrapped).x0
        regression = regression_loss(paired, target)
        trainer.check_finite("regression loss", regression)
        trainer.backward(config.regression.weight * regression)
        record["regression_loss"] = regression.detach()
    return record


def heads_update(
    config: DmdConfig, setup: DmdSetup, trainer: Trainer, role: Role, batches: Sequence[Batch]
) -> dict[str, float | Tensor]:
    """One update of the discriminator on the teacher's features, on the same samples; returns what to log."""
    assert setup.real is not None
    assert config.gan is not None
    judge, records = setup.judge_of(role.wrapped), []
    for number, batch in enumerate(batches):
        _, real, condition = setup.real.rows(batch.draw.indices, trainer.device)
        with trainer.sync(role, number == len(batches) - 1):
            loss = heads_step(
                batch.x0,
                batch.condition,
                (real, condition),
                judge=judge,
                draw=batch.draw,
                times=config.matching,
                clock=setup.teacher.family,
                gan=config.gan,
            )
            trainer.check_finite("discriminator loss", loss)
            trainer.backward(loss)
        records.append({"discriminator_loss": loss.detach()})
    return {**mean_records(records), "discriminator_grad_norm": trainer.update(role)}


def fake_score_backward(config: DmdConfig, setup: DmdSetup, trainer: Trainer, *, batch: Batch) -> dict[str, Tensor]:
    """Add the fake score's gradients for one slice; returns what to log."""
    real = None
    if setup.real is not None and setup.heads_role is None:
        real = setup.real.rows(batch.draw.indices, trainer.device)[1:]
    step = fake_score_step(
        batch.x0,
        batch.condition,
        fake_score=telling(setup.fake_role.wrapped, batch.exits),
        draw=batch.draw,
        times=config.matching,
        clock=setup.teacher.family,
        gan=config.gan,
        real=real,
    )
    trainer.check_finite("fake score loss", step.loss)
    trainer.backward(step.loss)
    record = {"fake_score_loss": step.flow_loss.detach()}
    if step.discriminator_loss is not None:
        record["discriminator_loss"] = step.discriminator_loss.detach()
    return record
