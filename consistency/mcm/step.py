"""A step of MCM (arXiv:2406.06890): the student with its motion head, then the discriminator on the same samples.

Networks are called here, arithmetic is in `motion.py`, `methods/dcm.py` and `dmd/gan_loss.py`. Legend: B batch; videos
x0, x_t, eps [B, C, F, h, w]; S judged frames of each, as videos of one frame [S B, C, 1, h, w].
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.consistency.batch import ConsistencyStep, Networks, Noised
from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.mcm.config import McmConfig, McmDiscriminatorConfig
from fewstep.consistency.mcm.frames import frame_places, pick_frames
from fewstep.consistency.mcm.motion import motion_loss
from fewstep.consistency.methods.dcm import distilled_pair, grid_pair
from fewstep.consistency.setup import ConsistencySetup
from fewstep.consistency.times import TimePair
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, at_least_fp32, x0_from_velocity
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.teacher import Teacher
from fewstep.core.training.metrics import mean_records
from fewstep.core.training.roles import Role, frozen
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.gan_loss import hinge_discriminator_loss, hinge_generator_loss

# Of the integer whose share decides where a step starts from.
COINS = 1 << 20


@dataclass(frozen=True)
class McmStep:
    """The student's loss, what to log of it, and the x0 that the loss was taken on, without graph."""

    loss: Tensor
    record: dict[str, Tensor]
    samples: Tensor


@dataclass(frozen=True)
class Judged:
    """Frames [M, C, 1, h, w] and their prompts, batch M."""

    frames: Tensor
    condition: Condition


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
            steps.append(motion_backward(config, setup, trainer, draw=draw))
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


def motion_backward(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer, *, draw: Draw) -> McmStep:
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


def starts_from_student(seed: int, step: int, share: float) -> bool:
    """Whether noise is added to the student's own videos in this step; the same on all processes."""
    return shared_integer(seed, step, "mcm_trajectory", COINS) < share * COINS


@torch.no_grad()
def student_videos(shape: tuple[int, ...], condition: Condition, student: nn.Module, *, draw: Draw) -> Tensor:
    """The student's x0 [B, C, F, h, w] in one step from pure noise: the start of MCM's simulated trajectories."""
    noise = draw.noise(shape, "mcm_start")
    t = torch.ones(len(noise), device=noise.device)
    return x0_from_velocity(noise, student(noise, t, condition), t)


def mcm_noised(
    data: tuple[Tensor, Condition],
    student: nn.Module,
    times: TimePair,
    *,
    draw: Draw,
    mcm: McmConfig,
    step: int,
) -> Noised:
    """What the step starts from, data (x0, condition) or the student's own videos, noised to the t of `times`.

    At the first time of the teacher's grid, t = 1, the state is the noise alone, whatever x0 is.
    """
    x0, condition = data
    shape = tuple(x0.shape[1:])
    if starts_from_student(draw.seed, step, mcm.mixed_share):
        x0 = student_videos(shape, condition, student, draw=draw)
    return Noised(x0, draw.noise(shape, "consistency_noise"), times.t, condition, step)


def mcm_student_step(
    noised: Noised,
    times: TimePair,
    networks: Networks,
    roles: tuple[Role | None, Role | None],
    *,
    draw: Draw,
    mcm: McmConfig,
) -> McmStep:
    """Discrete consistency of motion, plus the discriminator's view of single frames of the same x0.

    `roles` are the learned motion map and the discriminator's heads, each None where there is none.
    """
    motion, heads = roles
    prediction, target = distilled_pair(noised, times, networks)
    total = motion_term(prediction, target, motion, mcm)
    record = {"motion_loss": total.detach()}
    if heads is not None:
        settings = require_discriminator(mcm)
        judged = fake_frames(prediction, noised.condition, draw=draw, settings=settings, stream="mcm_student")
        features = frame_features(judged, networks.teacher, draw=draw, settings=settings, stream="mcm_student")
        with frozen(heads.module):
            adversarial = hinge_generator_loss(heads.module(features))
        total = total + settings.weight * adversarial
        record["adversarial_loss"] = adversarial.detach()
    return McmStep(total, record, prediction.detach())


def motion_term(prediction: Tensor, target: Tensor, motion: Role | None, mcm: McmConfig) -> Tensor:
    """mean sqrt((m(prediction) - m'(target))^2 + c^2) - c; m' is the learned map's moving average, else m itself."""
    if mcm.motion != "learned":
        return motion_loss(prediction, target, mcm.motion, constant=mcm.constant, cutoff=mcm.cutoff)
    assert motion is not None
    assert motion.ema is not None
    # The average first: it takes the live weights' place, which a graph would notice.
    with torch.no_grad(), motion.ema.applied(motion.module):
        mapped = motion.module(target)
    return motion_loss(motion.wrapped(prediction), mapped, "raw", constant=mcm.constant)


def mcm_discriminator_step(
    samples: Tensor,
    condition: Condition,
    real: Judged,
    heads: nn.Module,
    *,
    teacher: Teacher,
    draw: Draw,
    settings: McmDiscriminatorConfig,
) -> ConsistencyStep:
    """Hinge loss of the heads on frames of the student's x0 [B, C, F, h, w] and on real frames; the teacher is frozen.

    The public code's clamped losses are twice this, less a constant.
    """
    fake = fake_frames(samples, condition, draw=draw, settings=settings, stream="mcm_fake")
    with torch.no_grad():
        kinds = [
            frame_features(judged, teacher, draw=draw, settings=settings, stream=stream)
            for judged, stream in ((fake, "mcm_fake"), (real, "mcm_real"))
        ]
        features = [torch.cat(maps) for maps in zip(*kinds, strict=True)]
    fake_logits, real_logits = heads(features).split([len(fake.frames), len(real.frames)])
    loss = hinge_discriminator_loss(fake_logits, real_logits)
    record = {
        "fake_logit": fake_logits.detach().mean(),
        "real_logit": real_logits.detach().mean(),
        "discriminator_loss": loss.detach(),
    }
    return ConsistencyStep(loss, record)


def require_discriminator(mcm: McmConfig) -> McmDiscriminatorConfig:
    """The section of the discriminator. Raises ValueError where there is none."""
    if mcm.discriminator is None:
        raise ValueError("there are heads and the section mcm.discriminator is not there: give it")
    return mcm.discriminator


def fake_frames(
    video: Tensor, condition: Condition, *, draw: Draw, settings: McmDiscriminatorConfig, stream: str
) -> Judged:
    """The frames of the student's videos that are judged: the first beside pictures, else drawn ones."""
    if settings.pictures is None:
        return drawn_frames(video, condition, draw=draw, count=settings.frames, stream=stream)
    return Judged(video[:, :, :1], condition)


def drawn_frames(video: Tensor, condition: Condition, *, draw: Draw, count: int, stream: str) -> Judged:
    """One random frame of each of `count` parts of every video."""
    uniform = torch.stack([draw.uniform(f"{stream}_frame_{part}") for part in range(count)])
    return Judged(pick_frames(video, frame_places(uniform, video.shape[2])), condition.repeat(count))


def frame_features(
    judged: Judged, teacher: Teacher, *, draw: Draw, settings: McmDiscriminatorConfig, stream: str
) -> list[Tensor]:
    """Features [M, D, N] of the teacher's conditional call on noised single frames, with the graph to the frames."""
    groups = range(len(judged.frames) // len(draw.indices))
    shape, (smallest, largest) = tuple(judged.frames.shape[1:]), settings.judged_times
    eps = torch.cat([draw.noise(shape, f"{stream}_noise_{group}") for group in groups])
    uniform = torch.cat([draw.uniform(f"{stream}_time_{group}") for group in groups])
    t = smallest + (largest - smallest) * uniform
    x_t = add_noise(judged.frames, eps, t)
    return teacher.denoiser.velocity_and_features(x_t, t, judged.condition, settings.blocks)[1]
