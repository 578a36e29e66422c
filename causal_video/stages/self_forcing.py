"""Self-forcing: distribution matching on what the student rolls out itself (arXiv:2506.08009).

The bidirectional teacher and the fake score judge the whole video at one time.

Legend: B batch, C channels, F latent frames, n frames that learn, T frames of the teacher; videos [B, C, F, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.causal_video.denoise import ChunkNoise, ExitStep, VideoCondition
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import CallOutput, whole_call
from fewstep.causal_video.model.controls import controls_of
from fewstep.causal_video.rollout import Rollout, replayed_backward, rollout, switched_rollout
from fewstep.causal_video.schedule import StepSchedule, cycled_exit, random_exit
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.asd import StepPair, asd_discriminator_loss, asd_student_loss
from fewstep.causal_video.stages.batch import chunk_uniform, earlier_rows, gives_image, over_frames
from fewstep.causal_video.stages.config import CausalConfig
from fewstep.causal_video.stages.setup import CausalSetup
from fewstep.causal_video.stages.teacher_window import TeacherWindow, image_latent, teacher_window
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw, shared_integer
from fewstep.core.training.roles import frozen
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import GanConfig
from fewstep.dmd.matching import (
    EQUAL,
    Scores,
    StudentStep,
    drawn_guidance,
    fake_score_step,
    student_step,
    telling,
)


@dataclass(frozen=True)
class RolloutPlan:
    """What one step rolls out: the same in every process, a function of the step.

    Attributes:
        student_due: whether the student is updated in this step, or else the fake score.
        schedule: of the rollout.
        exit_step: where its chunks stop, see `StepSchedule.exits`.
        extra_chunks: chunks beyond those of the layout.
        learning_frames: frames at the end of a rollout with extra chunks that learn.
        told_exit: number of the exit among those of all schedules, where the fake score is told it.
        switch_chunk: first chunk under the judged prompt where another one comes before, at most the first that learns.
        recached: whether the change computes stored chunks again.
    """

    student_due: bool
    schedule: StepSchedule
    exit_step: int
    extra_chunks: int
    learning_frames: int
    told_exit: int | None = None
    switch_chunk: int | None = None
    recached: bool = True

    def exits(self, samples: int) -> Tensor | None:
        """int64 [samples] for a fake score that is told, or None."""
        return None if self.told_exit is None else torch.full((samples,), self.told_exit)

    @property
    def has_more_steps(self) -> bool:
        """Whether some chunk of the schedule has a step after the exit."""
        return self.exit_step + 1 < self.schedule.longest

    @property
    def of_one_step_more(self) -> RolloutPlan:
        """The same rollout with the next exit."""
        return replace(self, exit_step=self.exit_step + 1)


@dataclass(frozen=True, eq=False)
class RolloutInputs:
    """What a slice's rollouts are made of.

    Attributes:
        condition: what the teacher judges them under.
        image: [B, C, 1, h, w] first frames that are given, or None.
        earlier: the prompts before a change, or None.
    """

    condition: Condition
    image: Tensor | None = None
    earlier: Condition | None = None


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
    """The rollout of a step. The first step of a cycle is the student's, `ratio` are the fake score's.

    Student and fake score count their own rollouts, so that each of them meets every exit of a cycle (Causal-rCM,
    arXiv:2606.25473); with equal counters the student would stop at a few of them alone.
    """
    stage, seed = config.self_forcing, config.run.seed
    assert stage is not None
    assert config.fake_score is not None
    cycles, place = divmod(step, config.fake_score.ratio + 1)
    count = cycles if place == 0 else step - cycles - 1
    schedule, before = settings.schedule, 0
    if stage.rollout_schedules:
        chosen = shared_integer(seed, step, "rollout_schedule", len(stage.rollout_schedules))
        before = sum(map(max, stage.rollout_schedules[:chosen]))
        schedule = StepSchedule.steps(stage.rollout_schedules[chosen], shift=config.student.shift)
    match stage.exit:
        case "cycled":
            exit_step = cycled_exit(schedule, count)
        case "random":
            exit_step = random_exit(schedule, seed, step)
        case "last":
            exit_step = schedule.longest - 1
    extra, learning, switch = 0, stage.learning_frames(settings.layout), None
    if stage.longest_frames is not None:
        most = (stage.longest_frames - settings.layout.frames) // settings.layout.lengths[-1]
        extra = shared_integer(seed, step, "rollout_chunks", most + 1)
        # A given first frame belongs to its caption, which is judged.
        if extra > 0 and stage.prompt_switches != "none" and not gives_image(config.data.image_share, seed, step):
            fixed = settings.layout.chunks + extra - learning // settings.layout.lengths[-1]
            switch = 1 + shared_integer(seed, step, "prompt_switch", fixed)
    told = before + exit_step if config.fake_score.told_exit else None
    recached = stage.prompt_switches == "recache"
    return RolloutPlan(place == 0, schedule, exit_step, extra, learning, told, switch, recached)


def rollout_inputs(config: CausalConfig, setup: CausalSetup, plan: RolloutPlan, draw: Draw, step: int) -> RolloutInputs:
    """Prompts of a slice; in a share of the steps captions of videos, and the first frames [B, C, 1, h, w] of these.

    Controls come with their videos' captions: what is said and how it moves belong together.
    """
    given, seed = gives_image(config.data.image_share, config.run.seed, step), config.run.seed
    if not given and setup.controls is None:
        earlier = None
        if plan.switch_chunk is not None:
            earlier = setup.prompts.rows(earlier_rows(setup.prompts.prompts, draw.indices, seed))
        return RolloutInputs(setup.prompts.of_samples(draw.indices, seed), earlier=earlier)
    x0, condition = setup.videos(draw.indices, draw.device)
    return RolloutInputs(condition, x0[:, :, :1] if given else None)


def texts_of_inputs(config: CausalConfig, setup: CausalSetup, draw: Draw, step: int) -> list[str]:
    """The prompts of a slice, as `rollout_inputs` and `on_noised_data` choose them."""
    assert config.self_forcing is not None
    on_videos = setup.controls is not None or config.self_forcing.input == "noised_data"
    if on_videos or gives_image(config.data.image_share, config.run.seed, step):
        assert setup.real is not None
        return setup.real.captions(draw.indices)
    return setup.prompts.texts_of_samples(draw.indices, config.run.seed)


def on_noised_data(
    config: CausalConfig, setup: CausalSetup, *, draw: Draw, network: nn.Module
) -> tuple[Generated, Condition]:
    """The student's predictions of real videos, each chunk noised to one of its schedule's times, under the causal mask
    (CausVid, arXiv:2412.07772); and their captions. A chunk sees earlier ones as noisy as they are."""
    x0, condition = setup.videos(draw.indices, draw.device)
    layout, schedule = setup.settings.layout, setup.settings.schedule
    uniform = chunk_uniform(draw, layout, "noised_data_time")
    columns = []
    for chunk in range(layout.chunks):
        times = torch.tensor(schedule.of(chunk), device=draw.device, dtype=torch.float32)
        columns.append(times[(uniform[:, chunk] * len(times)).long().clamp(max=len(times) - 1)])
    t = over_frames(torch.stack(columns, dim=1), layout)
    x_t = add_noise(x0, draw.noise(tuple(x0.shape[1:]), "noised_data"), t)
    tokens = setup.student.tokens_per_frame(x0)
    mask = masks.block_causal(layout, tokens, setup.settings.policy, device=draw.device)
    # A flow map is asked for its jump to the end, from which x0 is what it is from a velocity.
    end = torch.zeros_like(t) if setup.student.has_two_times else None
    call = whole_call(x_t, t, condition.text, mask=mask, extra=controls_of(condition, x0.shape[2]), r=end)
    output = network(call)
    assert isinstance(output, CallOutput)
    return Generated(None, x0_from_velocity(x_t, output.velocity, t), (), None, x0.shape[2]), condition


def generate(
    setup: CausalSetup,
    plan: RolloutPlan,
    *,
    draw: Draw,
    inputs: RolloutInputs,
    exit_network: nn.Module | None = None,
) -> Generated:
    """Roll the student out. Frames that do not learn are generated anew in every step, at all steps of the schedule.

    A longer rollout ends in the teacher's window, whose new frames learn (streaming long tuning, LongLive,
    arXiv:2509.22622). LongLive carries a stream from step to step; here its beginning is generated by the weights of
    the step, which costs calls without gradients, and leaves no state between steps.
    """
    condition, image = inputs.condition, inputs.image
    layout, (channels, length, height, width) = setup.settings.layout, setup.latent_shape
    settings = replace(setup.settings, schedule=plan.schedule)
    extra = controls_of(condition, length)
    noise = ChunkNoise(draw.seed, tuple(draw.indices), (channels, height, width), stream="rollout")
    before, cache, fixed, learning = None, None, 0, layout.chunks
    if plan.extra_chunks > 0:
        learning = plan.learning_frames // layout.lengths[-1]
        fixed = layout.chunks + plan.extra_chunks - learning
        begun = beginning(setup, plan, inputs, noise, settings, chunks=fixed)
        before, cache = begun.video, begun.cache
    done = rollout(
        setup.student,
        VideoCondition(condition.text, image if fixed == 0 else None, extra),
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


@torch.no_grad()
def beginning(
    setup: CausalSetup,
    plan: RolloutPlan,
    inputs: RolloutInputs,
    noise: ChunkNoise,
    settings: CausalSettings,
    *,
    chunks: int,
) -> Rollout:
    """The chunks of a longer rollout that do not learn, at all steps of the schedule."""
    exits = plan.schedule.exits(plan.schedule.longest - 1, chunks)
    if inputs.earlier is None or plan.switch_chunk is None:
        condition = VideoCondition(inputs.condition.text, inputs.image)
        return rollout(setup.student, condition, noise, settings, exits=exits, replayable=False)
    condition, text = VideoCondition(inputs.earlier.text), inputs.condition.text
    how = {"exits": exits, "at_chunk": plan.switch_chunk, "recached": plan.recached}
    return switched_rollout(setup.student, condition, text, noise, settings, **how)


def student_backward(
    config: CausalConfig, setup: CausalSetup, trainer: Trainer, *, plan: RolloutPlan, draw: Draw
) -> dict[str, Tensor]:
    """Add the student's gradients of distribution matching on a rollout for one slice; returns what to log.

    With `replay` the rollout has no graph; the loss gives a gradient of the video, which goes back through each exit
    call, made again.
    """
    stage, scores, times = config.self_forcing, setup.scores, config.matching
    assert stage is not None
    assert scores is not None
    assert times is not None
    replay, wrapped = stage.replay, setup.student_role.wrapped
    inputs = rollout_inputs(config, setup, plan, draw, trainer.step)
    condition = inputs.condition
    with torch.set_grad_enabled(not replay):
        if stage.input == "noised_data":
            done, condition = on_noised_data(config, setup, draw=draw, network=wrapped)
        else:
            done = generate(setup, plan, draw=draw, inputs=inputs, exit_network=wrapped)
    new = done.new.detach().requires_grad_() if replay else done.new
    window = done.window(new)
    weights, judged = EQUAL, {}
    if setup.weigh is not None:
        prompts = texts_of_inputs(config, setup, draw, trainer.step)
        found = setup.weigh(setup.teacher, window.latents.detach(), window.counts, prompts)
        weights, judged = found.weights, found.record
    guidance, exits = drawn_guidance(times, config.teacher, draw), plan.exits(len(draw.indices))
    with frozen(scores.fake):
        step = student_step(
            window.latents,
            condition,
            scores=Scores(scores.real or setup.teacher, scores.fake, guidance, exits=exits),
            draw=draw,
            times=times,
            objective=config.objective,
            gan=config.gan,
            samples=replace(weights, chunks=setup.settings.layout.lengths if stage.scores == "causal" else None),
        )
        total = weighed_student_loss(step, window.counts, config.gan)
        record = {"student_loss": total.detach(), **step.log(), **judged}
        if config.asd is not None and scores.discriminator is not None and plan.has_more_steps:
            more = rollout_of_one_step_more(setup, plan, draw=draw, inputs=inputs)
            pair = StepPair(window.latents, more, condition, plan.exit_step + 1)
            with frozen(scores.discriminator):
                adversarial = asd_student_loss(
                    pair, fake_score=scores.fake, discriminator=scores.discriminator, draw=draw, times=times
                )
            total = total + config.asd.weight * adversarial
            record["student_asd_loss"] = adversarial.detach()
        trainer.check_finite("student loss", total)
        trainer.backward(total)
    if replay:
        assert new.grad is not None
        replayed_backward(wrapped, done.exits, condition.text, new.grad)
    return record


def weighed_student_loss(step: StudentStep, counts: Tensor, gan: GanConfig | None) -> Tensor:
    """The loss of a window whose frames bool [T] count or not: those that learn weigh what they would in a mean over
    them alone; a discriminator's logit is of the whole window, and stays as it is."""
    share = counts.float().mean()
    if gan is None or step.gan_loss is None:
        return step.loss / share
    adversarial = gan.weight * step.gan_loss
    return (step.loss - adversarial) / share + adversarial


@torch.no_grad()
def rollout_of_one_step_more(setup: CausalSetup, plan: RolloutPlan, *, draw: Draw, inputs: RolloutInputs) -> Tensor:
    """The window [B, C, T, h, w] of the rollout of one step more from the same noise, without graph."""
    done = generate(setup, plan.of_one_step_more, draw=draw, inputs=inputs)
    return done.window().latents


def fake_score_backward(
    config: CausalConfig, setup: CausalSetup, trainer: Trainer, *, plan: RolloutPlan, draw: Draw
) -> dict[str, Tensor]:
    """Add the gradients of fake score and discriminator for one slice, on fresh rollouts; returns what to log."""
    scores, times = setup.scores, config.matching
    assert scores is not None
    assert times is not None
    inputs = rollout_inputs(config, setup, plan, draw, trainer.step)
    condition = inputs.condition
    assert config.self_forcing is not None
    with torch.no_grad():
        if config.self_forcing.input == "noised_data":
            done, condition = on_noised_data(config, setup, draw=draw, network=setup.student)
        else:
            done = generate(setup, plan, draw=draw, inputs=inputs)
    video = done.window().latents
    fake_score = telling(scores.fake_role.wrapped, plan.exits(len(draw.indices)))
    step = fake_score_step(
        video,
        condition,
        fake_score=fake_score,
        draw=draw,
        times=times,
        clock=setup.teacher.family,
        gan=config.gan,
        real=None if setup.judged is None else setup.judged.rows(draw.indices, draw.device)[1:],
    )
    trainer.check_finite("fake score loss", step.loss)
    trainer.backward(step.loss)
    record = {"fake_score_loss": step.flow_loss.detach()}
    if step.discriminator_loss is not None:
        record["discriminator_loss"] = step.discriminator_loss.detach()
    if config.asd is not None and scores.discriminator_role is not None and plan.has_more_steps:
        more = rollout_of_one_step_more(setup, plan, draw=draw, inputs=inputs)
        adversarial = asd_discriminator_loss(
            StepPair(video, more, condition, plan.exit_step + 1),
            fake_score=scores.fake,
            discriminator=scores.discriminator_role.wrapped,
            draw=draw,
            times=times,
            penalty=config.asd.penalty,
        )
        trainer.check_finite("discriminator loss", adversarial)
        trainer.backward(adversarial)
        record["discriminator_loss"] = adversarial.detach()
    return record
