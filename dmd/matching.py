"""The two steps of DMD: what the student and the fake score minimise on one batch.

Networks are called here, arithmetic is in the loss files. Legend: B batch; x0, x_t, eps [B, C, H, W]; t [B] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.fake_score import FakeScore, FakeScoreOutput
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.settings import TeacherConfig
from fewstep.core.teacher import Teacher
from fewstep.core.time_law import Clock, draw_times, law_interval
from fewstep.dmd.config import (
    DmdObjective,
    FDistillObjective,
    GanConfig,
    MatchingConfig,
    MatchingObjective,
    SidObjective,
)
from fewstep.dmd.f_divergence import (
    density_ratio,
    divergence_weight,
    normalise_by_time,
    saturated_share,
    unit_mean,
)
from fewstep.dmd.gan_loss import (
    approximate_r1_penalty,
    discriminator_loss,
    generator_gan_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    perturb_noised_input,
)
from fewstep.dmd.loss import (
    MatchingStatistics,
    distribution_matching_loss,
    fake_score_loss,
    fake_score_weight,
    matching_statistics,
)
from fewstep.dmd.sid_loss import sid_loss

REVERSE_KL = DmdObjective()


def drawn_guidance(matching: MatchingConfig, teacher: TeacherConfig, draw: Draw) -> float | Tensor:
    """The guidance of the real score, or one for each sample [B] where it is spread."""
    middle, spread = matching.guidance_of(teacher), matching.guidance_spread
    return middle if spread == 0 else middle + spread * (2 * draw.uniform("score_guidance") - 1)


@dataclass(frozen=True)
class TeacherJudge:
    """Heads on the features of the frozen teacher; `heads` may be a distributed wrapper."""

    denoiser: Denoiser
    heads: nn.Module
    blocks: tuple[int, ...] | None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits, with the graph to x_t and to the heads."""
        return self.heads(self.denoiser.velocity_and_features(x_t, t, condition, self.blocks)[1])


@dataclass(frozen=True)
class Scores:
    """The two scores that are compared: the frozen teacher's with guidance, and the fake one.

    `fake` is the bare module with its parameters frozen by the caller: for SiD and the GAN gradients pass through it to
    x0. So is `judge`, the discriminator on the teacher's features, where there is one. `exits` [B] are those of the
    samples, where the fake score is told.
    """

    teacher: Teacher
    fake: FakeScore
    guidance: float | Tensor
    judge: TeacherJudge | None = None
    exits: Tensor | None = None

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition, output: FakeScoreOutput | None = None) -> Tensor:
        """The discriminator's logits [B]; `output` is the fake score's at the same place, where it was called."""
        if self.judge is not None:
            return self.judge(x_t, t, condition)
        # Told the exit of fakes alone, a discriminator would know them by that.
        if output is None or self.exits is not None:
            output = self.fake(x_t, t, condition)
        assert output is not None
        return require_logits(output)


@dataclass(frozen=True, eq=False)
class SampleWeights:
    """How the gradients of samples are put together.

    Attributes:
        weight: [B] factors, for the reverse KL; None is one.
        elements: [B, 1, ...] factors of places, for the reverse KL; None is one.
        chunks: lengths in frames of the parts of a video whose direction has a normaliser each, for the reverse KL.
        mean_over_processes: averages a 0-dim tensor over the processes of the run; f-distill's weights have mean one.
    """

    weight: Tensor | None = None
    elements: Tensor | None = None
    chunks: Sequence[int] | None = None
    mean_over_processes: Callable[[Tensor], Tensor] = Tensor.detach


EQUAL = SampleWeights()


def telling(fake_score: nn.Module, exits: Tensor | None) -> Callable[[Tensor, Tensor, Condition], FakeScoreOutput]:
    """The fake score, bare or wrapped, told the exits [n] of the first n samples; itself where there are none."""
    return fake_score if exits is None else partial(fake_score, exits=exits)


@dataclass(frozen=True)
class StudentStep:
    """The student's loss with its parts; `matching` compares the scores at this batch's x_t."""

    loss: Tensor
    matching: MatchingStatistics
    gan_loss: Tensor | None = None
    saturated_share: Tensor | None = None

    def log(self) -> dict[str, Tensor]:
        """Metrics by name; 0-dim, without graph."""
        record = {f"matching_{field.name}": getattr(self.matching, field.name) for field in fields(self.matching)}
        if self.gan_loss is not None:
            record["student_gan_loss"] = self.gan_loss.detach()
        if self.saturated_share is not None:
            record["saturated_share"] = self.saturated_share
        return record


@dataclass(frozen=True)
class FakeScoreStep:
    """The fake score's loss with its parts."""

    loss: Tensor
    flow_loss: Tensor
    discriminator_loss: Tensor | None = None


def student_step(
    x0: Tensor,
    condition: Condition,
    *,
    scores: Scores,
    draw: Draw,
    times: MatchingConfig,
    objective: MatchingObjective = REVERSE_KL,
    gan: GanConfig | None = None,
    samples: SampleWeights = EQUAL,
) -> StudentStep:
    """The student's loss on its samples x0 (with graph).

    Both scores are read at the same freshly noised x_t, the fake one without guidance.

    Raises:
        ValueError: a discriminator is read, and the fake score has none.
    """
    shape, clock = tuple(x0.shape[1:]), scores.teacher.family
    t = draw_times(draw, "score_time", times.score_times, clock)
    eps = draw.noise(shape, "score_noise")
    # SiD differentiates through both scores; for the others they are constants.
    through_networks = isinstance(objective, SidObjective)
    with torch.set_grad_enabled(through_networks):
        x_t = add_noise(x0 if through_networks else x0.detach(), eps, t)
        output = telling(scores.fake, scores.exits)(x_t, t, condition)
        fake_x0 = x0_from_velocity(x_t, output.velocity, t)
        real_x0 = scores.teacher.x0(x_t, t, condition, scores.guidance)

    saturated = None
    if isinstance(objective, SidObjective):
        total = sid_loss(x0, fake_x0, real_x0, alpha=objective.alpha)
    elif isinstance(objective, FDistillObjective):
        with torch.no_grad():
            logits = scores.logits(x_t, t, condition, output)
        ratio, saturated = density_ratio(logits), saturated_share(logits)
        if objective.time_bins > 0:
            bins = {"bins": objective.time_bins, "mean_over_processes": samples.mean_over_processes}
            ratio = normalise_by_time(ratio, t, interval=law_interval(times.score_times, clock), **bins)
        weight = divergence_weight(ratio, objective.divergence)
        weight = unit_mean(weight, mean=samples.mean_over_processes(weight.mean()))
        total = distribution_matching_loss(x0, fake_x0, real_x0, weight=weight)
    else:
        weight, elements, chunks = samples.weight, samples.elements, samples.chunks
        total = distribution_matching_loss(x0, fake_x0, real_x0, weight=weight, elements=elements, chunks=chunks)

    adversarial = None
    if gan is not None:
        # At times of its own: the discriminator is trained on the fake score's law of times, not on the scores'.
        gan_t = draw_times(draw, "gan_time", times.fake_times, clock)
        noised = add_noise(x0, draw.noise(shape, "gan_noise"), gan_t)
        adversarial = generator_loss(scores.logits(noised, gan_t, condition), gan)
        total = total + gan.weight * adversarial
    return StudentStep(total, matching_statistics(x0, fake_x0, real_x0), adversarial, saturated)


def fake_score_step(
    x0: Tensor,
    condition: Condition,
    *,
    fake_score: Callable[[Tensor, Tensor, Condition], FakeScoreOutput],
    draw: Draw,
    times: MatchingConfig,
    clock: Clock,
    gan: GanConfig | None = None,
    real: tuple[Tensor, Condition] | None = None,
) -> FakeScoreStep:
    """The fake score's loss on the student's samples x0 (without graph), with the discriminator's where there is a GAN.

    `fake_score` may be a distributed wrapper: it is called once, on the batch or on [batch, fakes, reals] joined; one
    that is told the exits of the batch (`telling`) is told none of the others. `real` are latents and their conditions,
    for the GAN; `clock` is the family of the networks.
    """
    shape = tuple(x0.shape[1:])
    t = draw_times(draw, "fake_time", times.fake_times, clock)
    eps = draw.noise(shape, "fake_noise")
    x_t = add_noise(x0, eps, t)
    if gan is None or gan.features == "teacher":
        flow = fake_score_loss(fake_score(x_t, t, condition).velocity, x0, eps, weight=error_weight(t, times))
        return FakeScoreStep(flow, flow)

    assert real is not None
    size = len(x0)
    judged = judged_samples(x0, condition, real, draw=draw, times=times, clock=clock, gan=gan)
    # One call, because a distributed wrapper averages the gradients of one call; three would be averaged too early.
    joined = Condition.cat([condition, judged.condition])
    output = fake_score(torch.cat([x_t, judged.x_t]), torch.cat([t, judged.t]), joined)
    flow = fake_score_loss(output.velocity[:size], x0, eps, weight=error_weight(t, times))
    adversarial = judged.losses(require_logits(output)[size:], size, gan)
    return FakeScoreStep(flow + gan.discriminator_weight * adversarial, flow, adversarial)


@dataclass(frozen=True, eq=False)
class Judged:
    """Noised samples that a discriminator learns from: fakes, reals, and reals moved a little where R1 is taken."""

    x_t: Tensor
    t: Tensor
    condition: Condition

    def losses(self, logits: Tensor, size: int, gan: GanConfig) -> Tensor:
        """The discriminator's loss of the logits of all of them; `size` is B."""
        fake, real, *moved = logits.split(size)
        loss = hinge_discriminator_loss(fake, real) if gan.loss == "hinge" else discriminator_loss(fake, real)
        if moved:
            loss = loss + gan.r1_weight * approximate_r1_penalty(real, moved[0]) / gan.r1_scale**2
        return loss


def judged_samples(
    x0: Tensor,
    condition: Condition,
    real: tuple[Tensor, Condition],
    *,
    draw: Draw,
    times: MatchingConfig,
    clock: Clock,
    gan: GanConfig,
) -> Judged:
    """Fakes x0 and real latents at times of the fake score's law; with `same_noise` both share time and noise."""
    latents, real_condition = real
    shape = tuple(x0.shape[1:])
    t, states = [], []
    for name, clean in (("fake", x0), ("real", latents)):
        stream = "discriminator_fake" if gan.same_noise else f"discriminator_{name}"
        t.append(draw_times(draw, f"{stream}_time", times.fake_times, clock))
        states.append(add_noise(clean, draw.noise(shape, f"{stream}_noise"), t[-1]))
    conditions = [condition, real_condition]
    if gan.r1_weight > 0:
        moved = draw.noise(shape, "discriminator_r1_noise")
        states.append(perturb_noised_input(states[-1], moved, scale=gan.r1_scale))
        t.append(t[-1])
        conditions.append(real_condition)
    return Judged(torch.cat(states), torch.cat(t), Condition.cat(conditions))


def generator_loss(logits: Tensor, gan: GanConfig) -> Tensor:
    """The student's adversarial loss of the logits of its noised samples."""
    return hinge_generator_loss(logits) if gan.loss == "hinge" else generator_gan_loss(logits)


def heads_step(
    x0: Tensor,
    condition: Condition,
    real: tuple[Tensor, Condition],
    *,
    judge: TeacherJudge,
    draw: Draw,
    times: MatchingConfig,
    clock: Clock,
    gan: GanConfig,
) -> Tensor:
    """The loss of heads on the teacher's features, on samples x0 without graph and real latents; the features are
    constants."""
    judged = judged_samples(x0, condition, real, draw=draw, times=times, clock=clock, gan=gan)
    with torch.no_grad():
        features = judge.denoiser.velocity_and_features(judged.x_t, judged.t, judged.condition, judge.blocks)[1]
    noise = None
    if gan.dropout > 0:
        # Of the sample, not of the device: the same for every cut of the batch, and after a resume.
        parts, heads = len(judged.t) // len(x0), len(features)
        drawn = draw.noise((parts, heads, gan.width), "discriminator_dropout")
        noise = drawn.transpose(0, 1).flatten(0, 1)
    return judged.losses(judge.heads(features, noise), len(x0), gan)


def error_weight(t: Tensor, times: MatchingConfig) -> Tensor | None:
    """Weight [B] of the fake score's error in the space that is configured; None is the velocity's own."""
    return None if times.fake_error == "velocity" else fake_score_weight(t, target=times.fake_error)


def require_logits(output: FakeScoreOutput) -> Tensor:
    """The discriminator's logits. Raises ValueError when the fake score was built without heads."""
    if output.logits is None:
        raise ValueError("this loss reads a discriminator, and the fake score has no heads: give the section gan")
    return output.logits
