"""Rollouts that a causal student is trained on, and the adversarial term between rollouts of n and n + 1 steps.

Legend: B batch, C channels, F latent frames, n frames that learn, T frames of the teacher; videos [B, C, F, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.causal_video.denoise import ChunkNoise, ExitStep, VideoCondition
from fewstep.causal_video.model.controls import controls_of
from fewstep.causal_video.rollout import rollout
from fewstep.causal_video.schedule import StepSchedule, cycled_exit, random_exit
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.asd import (
    PERTURBATION,
    StepDiscriminator,
    gradient_penalties,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)
from fewstep.causal_video.stages.batch import gives_image
from fewstep.causal_video.stages.config import CausalConfig, new_frames
from fewstep.causal_video.stages.setup import CausalSetup
from fewstep.causal_video.stages.teacher_window import TeacherWindow, image_latent, teacher_window
from fewstep.core.condition import Condition
from fewstep.core.fake_score import FakeScore
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw, shared_integer
from fewstep.dmd.config import LossConfig
from fewstep.dmd.gan_loss import perturb_noised_input


@dataclass(frozen=True)
class RolloutPlan:
    """What one step rolls out: the same in every process, a function of the step.

    Attributes:
        student_due: whose turn it is.
        schedule: of the rollout.
        exit_step: where its chunks stop, see `StepSchedule.exits`.
        extra_chunks: chunks beyond those of the layout.
    """

    student_due: bool
    schedule: StepSchedule
    exit_step: int
    extra_chunks: int


@dataclass(frozen=True, eq=False)
class Generated:
    """A rollout, cut into what is only context of the teacher's window and what learns.

    Attributes:
        before: [B, C, F - n, h, w] without graph, or None.
        new: [B, C, n, h, w], with a graph where gradients were on.
        exits: of the new chunks, for `replayed_backward`.
        first: [B, C, 1, h, w] first frame of the window as an image, where the window begins later than the video.
        length: T.
    """

    before: Tensor | None
    new: Tensor
    exits: tuple[ExitStep, ...]
    first: Tensor | None
    length: int

    def window(self, new: Tensor | None = None) -> TeacherWindow:
        """The last T frames, with other values of the new ones (for a replay) or their own."""
        new = self.new if new is None else new
        video = new if self.before is None else torch.cat([self.before, new], dim=2)
        return teacher_window(video, self.first, length=self.length, new_frames=new.shape[2])


def plan_rollout(config: CausalConfig, settings: CausalSettings, step: int) -> RolloutPlan:
    """The rollout of a step. Every `updates_per_student_update`-th step is the student's, the others the fake score's.

    Student and fake score count their own rollouts, so that each of them meets every exit of a cycle (Causal-rCM,
    arXiv:2606.25473); with equal counters the student would stop at a few of them alone.
    """
    assert config.fake_score is not None
    loss, seed, cycle = config.loss, config.run.seed, config.fake_score.updates_per_student_update
    turns, place = divmod(step, cycle)
    count = turns if place == 0 else step - turns - 1
    schedule = settings.schedule
    if loss.rollout_schedules:
        chosen = shared_integer(seed, step, "rollout_schedule", len(loss.rollout_schedules))
        schedule = StepSchedule.steps(loss.rollout_schedules[chosen], shift=config.student.shift)
    exit_step = cycled_exit(schedule, count) if loss.exit == "cycled" else random_exit(schedule, seed, step)
    extra = 0
    if loss.longest_frames is not None:
        most = (loss.longest_frames - settings.layout.frames) // settings.layout.lengths[-1]
        extra = shared_integer(seed, step, "rollout_chunks", most + 1)
    return RolloutPlan(place == 0, schedule, exit_step, extra)


def rollout_inputs(config: CausalConfig, setup: CausalSetup, draw: Draw, step: int) -> tuple[Condition, Tensor | None]:
    """Prompts of a slice; in a share of the steps captions of videos, and the first frames [B, C, 1, h, w] of these.

    Controls come with their videos' captions: what is said and how it moves belong together.
    """
    given = gives_image(config.data.image_share, config.run.seed, step)
    if not given and setup.controls is None:
        return setup.prompts.of_samples(draw.indices, config.run.seed), None
    x0, condition = setup.videos(draw.indices, draw.device)
    return condition, x0[:, :, :1] if given else None


def generate(
    config: CausalConfig,
    setup: CausalSetup,
    plan: RolloutPlan,
    *,
    draw: Draw,
    condition: Condition,
    image: Tensor | None,
    exit_network: nn.Module | None = None,
) -> Generated:
    """Roll the student out. Frames that do not learn are generated anew in every step, at all steps of the schedule.

    A longer rollout ends in the teacher's window, whose new frames learn (streaming long tuning, LongLive,
    arXiv:2509.22622). LongLive carries a stream from step to step; here its beginning is generated by the weights of
    the step, which costs calls without gradients, and leaves no state between steps.
    """
    layout, (channels, length, height, width) = setup.settings.layout, setup.latent_shape
    settings = replace(setup.settings, schedule=plan.schedule)
    extra = controls_of(condition, length)
    noise = ChunkNoise(draw.seed, tuple(draw.indices), (channels, height, width), stream="rollout")
    before, cache, fixed, learning = None, None, 0, layout.chunks
    if plan.extra_chunks > 0:
        learning = new_frames(config.loss, layout) // layout.lengths[-1]
        fixed = layout.chunks + plan.extra_chunks - learning
        with torch.no_grad():
            exits = plan.schedule.exits(plan.schedule.longest - 1, fixed)
            begun = rollout(setup.student, VideoCondition(condition.tokens, image), noise, settings, exits=exits)
        before, cache = begun.video, begun.cache
    done = rollout(
        setup.student,
        VideoCondition(condition.tokens, image if fixed == 0 else None, extra),
        noise,
        settings,
        exits=plan.schedule.exits(plan.exit_step, learning, first=fixed),
        cache=cache,
        exit_network=exit_network,
    )
    first = None
    if before is not None:
        start = before.shape[2] + done.video.shape[2] - length
        first = image_latent(setup.teacher.pipeline.components["vae"], before[:, :, : start + 1])
    return Generated(before, done.video, done.exits, first, length)


def has_more_steps(plan: RolloutPlan) -> bool:
    """Whether some chunk of the plan's schedule has a step after the exit."""
    return plan.exit_step + 1 < plan.schedule.longest


def asd_student_loss(
    fewer: Tensor,
    more: Tensor,
    condition: Condition,
    *,
    steps: int,
    fake_score: FakeScore,
    discriminator: StepDiscriminator,
    draw: Draw,
    matching: LossConfig,
) -> Tensor:
    """Adversarial loss of a rollout of `steps` (with graph) against one of a step more (ASD, arXiv:2511.01419).

    Both are noised to one time per sample, each with noise of its own, and judged on features of the fake score, whose
    parameters and those of the discriminator the caller has frozen.

    Args:
        fewer: [B, C, T, h, w] window of the rollout that exits after `steps` calls.
        more: the same after steps + 1 calls, without graph.
        condition: of both.
        steps: n.
        fake_score: gives the features.
        discriminator: judges them.
        draw: of the slice.
        matching: times of the fake score.
    """
    t = draw.times("asd_time", shift=matching.fake_shift, interval=matching.interval)
    noises = (draw.noise(tuple(fewer.shape[1:]), f"asd_noise_{name}") for name in ("fewer", "more"))
    logits = []
    for video, noise in zip((fewer, more.detach()), noises, strict=True):
        features = fake_score.denoiser.velocity_and_features(add_noise(video, noise, t), t, condition)[1]
        logits.append(discriminator(features, steps))
    return relativistic_generator_loss(*logits)


def asd_discriminator_loss(
    fewer: Tensor,
    more: Tensor,
    condition: Condition,
    *,
    steps: int,
    fake_score: FakeScore,
    discriminator: nn.Module,
    draw: Draw,
    config: CausalConfig,
) -> Tensor:
    """The discriminator's loss on two rollouts without graph, with its penalties; the features are constants.

    Arguments as in `asd_student_loss`; `discriminator` may be a distributed wrapper: it is called once.
    """
    matching, shape = config.matching, tuple(fewer.shape[1:])
    t = draw.times("asd_critic_time", shift=matching.fake_shift, interval=matching.interval)
    states = []
    for name, video in (("fewer", fewer), ("more", more)):
        x_t = add_noise(video, draw.noise(shape, f"asd_critic_noise_{name}"), t)
        moved = perturb_noised_input(x_t, draw.noise(shape, f"asd_moved_{name}"), scale=PERTURBATION)
        states += [x_t, moved]
    with torch.no_grad():
        joined = Condition.cat([condition] * len(states))
        x_t, times = torch.cat(states), torch.cat([t] * len(states))
        features = fake_score.denoiser.velocity_and_features(x_t, times, joined)[1]
    fewer_logits, fewer_moved, more_logits, more_moved = discriminator(features, steps).chunk(len(states))
    penalty = gradient_penalties((fewer_logits, more_logits), (fewer_moved, more_moved))
    return relativistic_discriminator_loss(fewer_logits, more_logits) + config.loss.asd_penalty * penalty
