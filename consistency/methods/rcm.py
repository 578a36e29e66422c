"""Distribution matching beside a consistency loss: rCM (arXiv:2510.08431), and AnyFlow's second stage.

    loss = consistency + lambda * 2 * dmd

The consistency half is that of `scm.py`, `dcm.py` or `anyflow.py`. In the steps of the student both halves add their
gradients; in the other steps of a cycle the fake score learns, on fresh samples. Legend: B batch; x0 [B, C, h, w].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.consistency.config import ConsistencyConfig, ConsistencyMatchingConfig
from fewstep.consistency.methods.anyflow import rollout_samples
from fewstep.consistency.sections import AnyflowConfig
from fewstep.consistency.setup import ConsistencySetup
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.time_law import draw_times
from fewstep.core.training.roles import frozen
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.matching import Scores, drawn_guidance, fake_score_step, student_step


def is_students_step(matching: ConsistencyMatchingConfig, cycle: int, step: int) -> bool:
    """Whether the student learns in this step, and not the fake score; always before distribution matching begins."""
    return step < matching.start or (step - matching.start) % cycle == 0


def student_samples(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> Tensor:
    """The student's x0 on prompts, with a graph where gradients are on.

    The step with the gradient is drawn from (seed, step) alone, so all processes stop there and build the same graph.
    """
    condition = setup.prompts.of_samples(draw.indices, config.run.seed)
    if isinstance(config.settings, AnyflowConfig):
        shape, shift = setup.latent_shape, config.student.shift
        assert setup.frozen_student is not None
        return rollout_samples(
            setup.student_role,
            setup.frozen_student,
            condition,
            config.settings,
            draw=draw,
            shape=shape,
            shift=shift,
            step=trainer.step,
        )
    assert config.matching is not None
    if config.matching.rollout == "drawn":
        return drawn_rollout(config, setup, trainer, condition=condition, draw=draw)
    grad_step = shared_integer(config.run.seed, trainer.step, "grad_step", len(setup.student.times))
    renoise = [draw.noise(setup.latent_shape, f"renoise_{step}") for step in range(grad_step)]
    # The distributed wrapper is for calls whose gradients are averaged; the others go to the bare network.
    wrapped = setup.student_role.wrapped if torch.is_grad_enabled() else None
    return setup.student.rollout(draw.noise(setup.latent_shape, "noise"), condition, renoise, grad_step, wrapped).x0


def drawn_rollout(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, condition: Condition, draw: Draw
) -> Tensor:
    """rCM's rollout (public code): 1, 2, ... calls in turn, with re-noising between them; only the last has a graph.

    The first time is that of the student's grid, the others are drawn for each sample by the law of the fake score's
    times, each at most the one before. Student and fake score count their own rollouts.
    """
    assert config.matching is not None
    assert config.fake_score is not None
    cycles, place = divmod(trainer.step - config.matching.start, config.fake_score.ratio + 1)
    calls = 1 + (cycles if place == 0 else cycles * config.fake_score.ratio + place - 1) % len(setup.student.times)
    wrapped, student = setup.student_role.wrapped, setup.student_role.module
    x_t = draw.noise(setup.latent_shape, "noise")
    t = torch.full((len(x_t),), setup.student.times[0], device=x_t.device)
    for call in range(calls - 1):
        with torch.no_grad():
            x0 = x0_from_velocity(x_t, student(x_t, t, condition), t)
        law = draw_times(draw, f"rollout_time_{call}", config.matching.fake_times, setup.teacher.family)
        t = torch.minimum(t, law)
        x_t = add_noise(x0, draw.noise(setup.latent_shape, f"renoise_{call}"), t)
    called = wrapped if torch.is_grad_enabled() else student
    return x0_from_velocity(x_t, called(x_t, t, condition), t)


def matching_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of lambda times the distribution matching loss for one slice; returns what to log."""
    assert setup.fake_score is not None
    assert config.matching is not None
    x0 = student_samples(config, setup, trainer, draw=draw)
    with frozen(setup.fake_score):
        step = student_step(
            x0,
            setup.prompts.of_samples(draw.indices, config.run.seed),
            scores=Scores(setup.teacher, setup.fake_score, drawn_guidance(config.matching, config.teacher, draw)),
            draw=draw,
            times=config.matching,
        )
        trainer.check_finite("matching loss", step.loss)
        # The loss of DMD carries a factor 1/2 that rCM's does not, and is a mean over the numbers of a sample, which
        # must be reduced as those of the consistency half are: those of scm are summed.
        size = x0[0].numel() if config.scm is not None else 1
        trainer.backward(2.0 * config.matching.weight * size * step.loss)
    return {"matching_loss": step.loss.detach(), **step.log()}


def fake_score_backward(
    config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw
) -> dict[str, Tensor]:
    """Add the fake score's gradients for one slice, on fresh samples of the student; returns what to log."""
    assert setup.fake_role is not None
    assert config.matching is not None
    with torch.no_grad():
        x0 = student_samples(config, setup, trainer, draw=draw)
    condition = setup.prompts.of_samples(draw.indices, config.run.seed)
    clock = setup.teacher.family
    step = fake_score_step(
        x0, condition, fake_score=setup.fake_role.wrapped, draw=draw, times=config.matching, clock=clock
    )
    trainer.check_finite("fake score loss", step.loss)
    trainer.backward(step.loss)
    return {"fake_score_loss": step.flow_loss.detach()}
