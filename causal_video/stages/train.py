"""The training loop of causal video students: stages on given videos, and self-forcing on rollouts."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fewstep.causal_video.rollout import replayed_backward
from fewstep.causal_video.stages.batch import VideoBatch, gives_image
from fewstep.causal_video.stages.config import FLOW_METHODS, CausalConfig
from fewstep.causal_video.stages.consistency import tf_dcm_turn, tf_scm_turn
from fewstep.causal_video.stages.forcing import (
    ForcingTurn,
    context_of_batch,
    diffusion_forcing_turn,
    drop_captions,
    teacher_forcing_turn,
)
from fewstep.causal_video.stages.ode import ode_turn
from fewstep.causal_video.stages.self_forcing import (
    Generated,
    RolloutPlan,
    asd_discriminator_loss,
    asd_student_loss,
    generate,
    has_more_steps,
    plan_rollout,
    rollout_inputs,
)
from fewstep.causal_video.stages.setup import CausalData, CausalSetup, build_setup, check_tangent
from fewstep.causal_video.stages.watch import VideoWatch, describe_run
from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import frozen
from fewstep.core.training.run import open_run
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.matching import fake_score_turn, student_turn


def train_causal_video(config: CausalConfig) -> int:
    """Train a causal student; returns the exit code (0, or 128 + signal after SIGTERM or Ctrl-C, with a checkpoint).

    The stages of Causal-rCM (arXiv:2606.25473) are runs of their own, each starting from the one before
    (`student.init`): flow matching under teacher or diffusion forcing, consistency on clean context, self-forcing.

    Raises:
        ValueError: a setting, file or model does not fit. NonFiniteError: a loss or gradient is not finite.
    """
    data = CausalData.read(config)
    with open_run(config) as run:
        config, trainer = run.config, run.trainer
        setup = build_setup(config, data, trainer)
        notes = (partial(describe_run, config, setup, trainer), partial(check_tangent, config, setup, trainer))
        for _ in run.steps(VideoWatch(config, setup, trainer), *notes, beside=setup.save_settings):
            run.finish_step(train_step(config, setup, trainer))
    return run.exit_code


def train_step(config: CausalConfig, setup: CausalSetup, trainer: Trainer) -> dict[str, float | Tensor]:
    """One step: the student's, or in self_forcing the student's or the fake score's. Returns its metrics."""
    plan = plan_rollout(config, setup.settings, trainer.step) if config.method == "self_forcing" else None
    student_due = plan is None or plan.student_due
    role = setup.student_role if student_due else setup.fake_role
    assert role is not None
    slices = trainer.micro_batches(trainer.local_indices(trainer.step, config.run.batch_size))
    records: list[dict[str, Tensor]] = []
    for number, indices in enumerate(slices):
        draw = Draw(config.run.seed, indices, trainer.device)
        with ExitStack() as stack:
            stack.enter_context(trainer.sync(role, number == len(slices) - 1))
            if plan is None:
                records.append(forcing_backward(config, setup, trainer, draw=draw))
            elif student_due:
                records.append(student_backward(config, setup, trainer, plan=plan, draw=draw))
            else:
                if setup.discriminator_role is not None:
                    stack.enter_context(trainer.sync(setup.discriminator_role, number == len(slices) - 1))
                records.append(fake_score_backward(config, setup, trainer, plan=plan, draw=draw))
    metrics: dict[str, float | Tensor] = {**mean_records(records)}
    metrics["student_grad_norm" if student_due else "fake_grad_norm"] = trainer.update(role)
    if "discriminator_loss" in metrics:
        assert setup.discriminator_role is not None
        metrics["discriminator_grad_norm"] = trainer.update(setup.discriminator_role)
    return metrics


def forcing_backward(config: CausalConfig, setup: CausalSetup, trainer: Trainer, *, draw: Draw) -> dict[str, Tensor]:
    """Add the gradients of a loss on given videos for one slice; returns what to log."""
    turn = forcing_turn(config, setup, trainer, draw=draw)
    trainer.check_finite(f"{config.method} loss", turn.loss)
    trainer.backward(turn.loss)
    return {"forcing_loss": turn.loss.detach(), **turn.record}


def forcing_turn(config: CausalConfig, setup: CausalSetup, trainer: Trainer, *, draw: Draw) -> ForcingTurn:
    """The loss of the configured stage on one slice."""
    loss, networks = config.loss, setup.networks
    if config.method == "ode":
        assert setup.pairs is not None
        return ode_turn(setup.pairs.batch(draw, setup.settings), networks, loss=loss)
    batch = video_batch(config, setup, draw, trainer.step)
    turns = {
        "teacher_forcing": teacher_forcing_turn,
        "diffusion_forcing": diffusion_forcing_turn,
        "tf_dcm": tf_dcm_turn,
        "tf_scm": tf_scm_turn,
    }
    return turns[config.method](batch, networks, draw=draw, loss=loss)


def video_batch(config: CausalConfig, setup: CausalSetup, draw: Draw, step: int) -> VideoBatch:
    """Videos of one slice with their noise and captions, and in a share of the steps a given first frame."""
    x0, condition = setup.videos(draw.indices, draw.device)
    if config.method in FLOW_METHODS:
        condition = drop_captions(condition, setup.teacher.null_condition, draw, config.loss.condition_drop)
    context, context_time = context_of_batch(x0, draw, config.loss.context_noise)
    image = x0[:, :, :1] if gives_image(config.data.image_share, config.run.seed, step) else None
    eps = draw.noise(tuple(x0.shape[1:]), "forcing_noise")
    return VideoBatch(x0, eps, condition, context, context_time, image, step)


def student_backward(
    config: CausalConfig, setup: CausalSetup, trainer: Trainer, *, plan: RolloutPlan, draw: Draw
) -> dict[str, Tensor]:
    """Add the student's gradients of distribution matching on a rollout for one slice; returns what to log.

    The bidirectional teacher and the fake score judge the whole video at one time. With `loss.replay` the rollout has
    no graph; the loss gives a gradient of the video, which goes back through each exit call, made again.
    """
    assert setup.fake_score is not None
    replay, wrapped = config.loss.replay, setup.student_role.wrapped
    condition, image = rollout_inputs(config, setup, draw, trainer.step)
    with torch.set_grad_enabled(not replay):
        done = generate(config, setup, plan, draw=draw, condition=condition, image=image, exit_network=wrapped)
    new = done.new.detach().requires_grad_() if replay else done.new
    window = done.window(new)
    with frozen(setup.fake_score):
        turn = student_turn(
            window.latents,
            condition,
            teacher=setup.teacher,
            fake_score=setup.fake_score,
            guidance=config.teacher.guidance,
            loss=config.matching,
            draw=draw,
        )
        # The frames that learn are to weigh what they would in a mean over them alone.
        total = turn.loss / window.counts.float().mean()
        record = {"student_loss": total.detach(), **turn.log()}
        if setup.discriminator is not None and has_more_steps(plan):
            more = longer(config, setup, plan, draw=draw, condition=condition, image=image)
            with frozen(setup.discriminator):
                adversarial = asd_student_loss(
                    window.latents,
                    more.window().latents,
                    condition,
                    steps=plan.exit_step + 1,
                    fake_score=setup.fake_score,
                    discriminator=setup.discriminator,
                    draw=draw,
                    matching=config.matching,
                )
            total = total + config.loss.asd_weight * adversarial
            record["student_asd_loss"] = adversarial.detach()
        trainer.check_finite("student loss", total)
        trainer.backward(total)
    if replay:
        assert new.grad is not None
        replayed_backward(wrapped, done.exits, condition.tokens, new.grad)
    return record


@torch.no_grad()
def longer(
    config: CausalConfig,
    setup: CausalSetup,
    plan: RolloutPlan,
    *,
    draw: Draw,
    condition: Condition,
    image: Tensor | None,
) -> Generated:
    """The rollout of one step more from the same noise, without graph."""
    plan = replace(plan, exit_step=plan.exit_step + 1)
    return generate(config, setup, plan, draw=draw, condition=condition, image=image)


def fake_score_backward(
    config: CausalConfig, setup: CausalSetup, trainer: Trainer, *, plan: RolloutPlan, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of fake score and discriminator for one slice, on fresh rollouts; returns what to log."""
    assert setup.fake_role is not None
    assert setup.fake_score is not None
    condition, image = rollout_inputs(config, setup, draw, trainer.step)
    with torch.no_grad():
        video = generate(config, setup, plan, draw=draw, condition=condition, image=image).window().latents
    turn = fake_score_turn(
        video, condition, fake_score=setup.fake_role.wrapped, loss=config.matching, draw=draw, real=None
    )
    trainer.check_finite("fake score loss", turn.loss)
    trainer.backward(turn.loss)
    record = {"fake_score_loss": turn.flow_loss.detach()}
    if setup.discriminator_role is not None and has_more_steps(plan):
        more = longer(config, setup, plan, draw=draw, condition=condition, image=image)
        adversarial = asd_discriminator_loss(
            video,
            more.window().latents,
            condition,
            steps=plan.exit_step + 1,
            fake_score=setup.fake_score,
            discriminator=setup.discriminator_role.wrapped,
            draw=draw,
            config=config,
        )
        trainer.check_finite("discriminator loss", adversarial)
        trainer.backward(adversarial)
        record["discriminator_loss"] = adversarial.detach()
    return record
