"""The two kinds of steps of SANA-Sprint (arXiv:2503.09641): what student and discriminator minimise on one batch.

Networks are called here, arithmetic is in the loss files. Legend: B batch; x0, x_t, eps [B, C, h, w]; t [B] in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks, Noised
from fewstep.consistency.methods.scm import (
    normalise_tangent,
    path_derivative,
    scm_loss,
    tangent_record,
    trig_direction,
)
from fewstep.consistency.sana_sprint.config import (
    SprintConfig,
    SprintConsistencyConfig,
    SprintDiscriminatorConfig,
)
from fewstep.consistency.sana_sprint.loss import drawn_guidance, judged_pairs, judged_times
from fewstep.consistency.times import logit_normal, mix_max_time
from fewstep.core.condition import Condition
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.core.teacher import Teacher
from fewstep.core.training.roles import evaluating, frozen
from fewstep.dmd.gan_loss import hinge_discriminator_loss, hinge_generator_loss


def sprint_noised(data: DataBatch, settings: SprintConfig) -> Noised:
    """The data at a random time for each sample."""
    normal = data.draw.noise((), "consistency_time")
    return data.at(logit_normal(normal, mean=settings.time_mean, std=settings.time_std))


def with_drawn_guidance(noised: Noised, *, draw: Draw, sprint: SprintConfig) -> Noised:
    """The batch with a guidance scale in its condition, drawn for each sample."""
    scales = drawn_guidance(draw.uniform("sprint_guidance"), sprint.guidance_scales)
    return replace(noised, condition=replace(noised.condition, guidance=scales))


def sprint_student_step(noised: Noised, networks: Networks, *, draw: Draw, sprint: SprintConfig) -> ConsistencyStep:
    """sCM in TrigFlow against the teacher guided by the drawn scales, plus the adversarial term.

    A term whose section is not there is not computed.

    Raises:
        ValueError: the heads are missing.
    """
    noised = with_drawn_guidance(noised, draw=draw, sprint=sprint)
    terms: list[Tensor] = []
    record: dict[str, Tensor] = {}
    consistency, discriminator = sprint.consistency, sprint.discriminator
    if consistency is not None:
        step = guided_scm_step(noised, networks, consistency)
        terms.append(consistency.weight * step.loss)
        record |= {"scm_loss": step.loss.detach(), **step.record}
    if discriminator is not None:
        x0 = adversarial_samples(noised, networks.wrapped, draw=draw, settings=discriminator)
        # Spectral norms follow the weights in the discriminator's own steps alone.
        with frozen(require_heads(networks)), evaluating(require_heads(networks)):
            logits = judge(x0, noised.condition, networks, draw=draw, settings=discriminator, stream="sprint_student")
        adversarial = hinge_generator_loss(logits)
        terms.append(discriminator.weight * adversarial)
        record["adversarial_loss"] = adversarial.detach()
    return ConsistencyStep(torch.stack(terms).sum(), record)


def guided_scm_step(noised: Noised, networks: Networks, settings: SprintConsistencyConfig) -> ConsistencyStep:
    """sCM with the guidance of the condition as the teacher's.

    The paper's learned weight settles at one over the mean square of the tangent, which undoes the mean over the D
    elements of a sample. Without it the elements are summed, which comes to the same order; with a mean, the
    adversarial loss would weigh D times as much as lambda says.
    """
    x_t, t, condition = noised.x_t, noised.t, noised.condition
    assert condition.guidance is not None
    with torch.no_grad():
        target = networks.teacher.velocity(x_t, t, condition, condition.guidance)
    weight = networks.time_weight
    derivative = path_derivative(noised, networks.student, target, settings, "trigflow")
    with nullcontext() if weight is None else time_embeddings(networks.student) as embeddings:
        velocity = networks.wrapped(x_t, t, condition)
    output, tangent = trig_direction(noised, velocity, target, derivative, settings)
    direction = normalise_tangent(tangent.total, constant=settings.normalizer)
    if weight is None or embeddings is None:
        found = scm_loss(output, direction, reduction="sum")
        return ConsistencyStep(found.loss, tangent_record(tangent, found))
    learned = weight(embeddings[-1])
    # The public code's prior weight, 1 / (sigma_data tan) with its sigma_data of 1/2; it is a constant to w.
    prior = math.log(2) - torch.logit(t.double(), eps=1e-9).to(learned.dtype)
    found = scm_loss(output, direction, log_weight=learned + prior)
    # The constant in the prior is no part of the loss.
    loss = found.loss + prior.mean()
    return ConsistencyStep(loss, {**tangent_record(tangent, found), "log_weight": learned.detach().mean()})


@contextmanager
def time_embeddings(student: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the time embeddings [B, D], guidance included, of the calls of a student in the block, with graph."""
    found: list[Tensor] = []
    network: Any = student.get_submodule("network")
    embedder = getattr(network, "transformer", network).time_embed
    handle = embedder.register_forward_hook(lambda _, __, output: found.append(output[1]))
    try:
        yield found
    finally:
        handle.remove()


def sprint_discriminator_step(
    noised: Noised, networks: Networks, *, draw: Draw, sprint: SprintConfig
) -> ConsistencyStep:
    """Hinge loss of the heads alone, on noised samples of the student, misaligned pairs, and data.

    Wrong prompts come from the same slice of the batch, so the loss depends on how a batch is cut into slices.

    Raises:
        ValueError: there is no discriminator.
    """
    heads, settings = require_heads(networks), sprint.discriminator
    if settings is None:
        raise ValueError("the section sana_sprint.discriminator is not there: give it, or make no step of the heads")
    noised = with_drawn_guidance(noised, draw=draw, sprint=sprint)
    with torch.no_grad():
        fake = adversarial_samples(noised, networks.student, draw=draw, settings=settings)
        pairs = judged_pairs(fake, noised.x0, noised.condition, misaligned=settings.misaligned)
        # Each of up to three groups has noise and times of its own.
        names = ("sprint_fake", "sprint_misaligned", "sprint_real")
        kept = names if pairs.fakes > len(fake) else (names[0], names[2])
        eps = torch.cat([draw.noise(tuple(fake.shape[1:]), f"{name}_noise") for name in kept])
        normal = torch.cat([draw.noise((), f"{name}_time") for name in kept])
        features = teacher_features(pairs.x0, pairs.condition, networks.teacher, (eps, normal), settings)
    # Fakes and reals are normalised apart, as in the two calls of the source.
    apart = [] if settings.head == "mlp" else [(pairs.fakes, len(pairs.x0) - pairs.fakes)]
    logits = heads(features, *apart)
    fake_logits, real_logits = logits[: pairs.fakes], logits[pairs.fakes :]
    loss = hinge_discriminator_loss(fake_logits, real_logits)
    record = {
        "fake_logit": logits[: len(fake)].detach().mean(),
        "real_logit": real_logits.detach().mean(),
        "discriminator_loss": loss.detach(),
    }
    return ConsistencyStep(loss, record)


def require_heads(networks: Networks) -> nn.Module:
    """The discriminator's heads. Raises ValueError where the run has none."""
    if networks.heads is None:
        raise ValueError(
            "the adversarial loss needs a discriminator and there is none: give the section sana_sprint.discriminator"
        )
    return networks.heads


def adversarial_samples(
    noised: Noised, student: nn.Module, *, draw: Draw, settings: SprintDiscriminatorConfig
) -> Tensor:
    """The student's x0 at the sampled times, or from pure noise for a share of the samples, in a call of its own.

    The paper draws between the two with probability 1/2; that it does so for each sample is our reading.
    """
    t = mix_max_time(noised.t, draw.uniform("sprint_max_time"), share=settings.max_time_share, maximum=1.0)
    x_t = add_noise(noised.x0, noised.eps, t)
    return x0_from_velocity(x_t, student(x_t, t, noised.condition), t)


def judge(
    x0: Tensor,
    condition: Condition,
    networks: Networks,
    *,
    draw: Draw,
    settings: SprintDiscriminatorConfig,
    stream: str,
) -> Tensor:
    """Logits [B] of x0 after fresh noise, with the graph through the frozen teacher to x0."""
    eps, normal = draw.noise(tuple(x0.shape[1:]), f"{stream}_noise"), draw.noise((), f"{stream}_time")
    return require_heads(networks)(teacher_features(x0, condition, networks.teacher, (eps, normal), settings))


def teacher_features(
    x0: Tensor,
    condition: Condition,
    teacher: Teacher,
    noise: tuple[Tensor, Tensor],
    settings: SprintDiscriminatorConfig,
) -> list[Tensor]:
    """Features [M, D, N] of the teacher's conditional call on noised x0 [M, ...]; noise is eps [M, ...], normal [M]."""
    eps, normal = noise
    t = judged_times(normal, mean=settings.noise_mean, std=settings.noise_std, sigma_data=settings.sigma_data)
    _, features = teacher.denoiser.velocity_and_features(add_noise(x0, eps, t), t, condition, settings.blocks)
    return features
