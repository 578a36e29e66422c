"""Losses of distribution matching distillation, as functions of tensors alone.

Legend: B batch. x0 is the student's sample, with its graph. x_t is that sample noised anew, which the caller does
without a graph. fake_x0 and real_x0 are the x0 predictions at x_t of the fake score (never guided) and of the teacher
(guided), all [B, ...]. Arithmetic in fp32, fp64 where an input is fp64. A nan in an input reaches loss and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import expand_weight, require_same_shape

NORMALISER_FLOOR = 1e-5


@dataclass(frozen=True, eq=False)
class MatchingStatistics:
    """What a generator step says about the health of a run. 0-dim tensors on the device of the inputs, without graph.

    Attributes:
        direction_rms: root mean square of fake_x0 - real_x0; zero when the fake score equals the teacher.
        gradient_rms: the same after the normaliser, per element of x0 and before the mean over elements.
        normaliser_mean: mean over the batch of mean |x0 - real_x0|, floor included.
        floored_share: share of samples whose normaliser stands at the floor, in [0, 1]; above 0 in a healthy run only
            for a student that reproduces the teacher's prediction exactly.
        student_mean, student_std: over all elements of x0: brightness and contrast of the samples.
        fake_mean, fake_std: of fake_x0.
        teacher_mean, teacher_std: of real_x0. Both predictions are posterior means at the same x_t, so they compare
            with each other at any t; student_std is larger than both at large t.
    """

    direction_rms: Tensor
    gradient_rms: Tensor
    normaliser_mean: Tensor
    floored_share: Tensor
    student_mean: Tensor
    student_std: Tensor
    fake_mean: Tensor
    fake_std: Tensor
    teacher_mean: Tensor
    teacher_std: Tensor


def direction_normaliser(x0: Tensor, real_x0: Tensor, *, floor: float = NORMALISER_FLOOR) -> Tensor:
    """mean |x0 - real_x0| of each sample over its other dimensions, at least `floor`: [B], without graph.

    DMD, arXiv:2311.18828, Eq. 8, without its factors of the noise level (DMD2's code, and ours, divide x0 differences).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, real_x0=real_x0)
    distance = (at_least_fp32(x0.detach()) - at_least_fp32(real_x0.detach())).abs()
    return distance.flatten(1).mean(dim=1).clamp(min=floor)


@torch.no_grad()
def matching_direction(
    x0: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    *,
    weight: Tensor | None = None,
    elements: Tensor | None = None,
    chunks: Sequence[int] | None = None,
    floor: float = NORMALISER_FLOOR,
) -> Tensor:
    """weight elements (fake_x0 - real_x0) / normaliser, [B, ...]: descent along it moves x0 towards the teacher.

    With `chunks`, lengths in frames, the normaliser of a video [B, C, F, h, w] is that of each chunk by itself.

    Raises:
        ValueError: the shapes differ, weight is not [B], elements not [B, 1, ...], or the chunks do not add up to F.
    """
    require_same_shape(x0=x0, fake_x0=fake_x0, real_x0=real_x0)
    if elements is not None:
        one_channel = (x0.shape[0], 1, *x0.shape[2:])
        if elements.shape != one_channel:
            raise ValueError(f"elements must be {one_channel}, one channel, got {tuple(elements.shape)}")
        whole = matching_direction(x0, fake_x0, real_x0, weight=weight, chunks=chunks, floor=floor)
        return whole * at_least_fp32(elements)
    if chunks is not None:
        if x0.ndim != 5 or sum(chunks) != x0.shape[2]:
            raise ValueError(f"chunks {list(chunks)} of videos {tuple(x0.shape)}: they must add up to the frames")
        parts = zip(*(video.split(list(chunks), dim=2) for video in (x0, fake_x0, real_x0)), strict=True)
        return torch.cat([matching_direction(*part, weight=weight, floor=floor) for part in parts], dim=2)
    direction = at_least_fp32(fake_x0) - at_least_fp32(real_x0)
    direction = direction / expand_weight(direction_normaliser(x0, real_x0, floor=floor), x0)
    return direction if weight is None else direction * expand_weight(weight, x0)


def distribution_matching_loss(
    x0: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    *,
    weight: Tensor | None = None,
    elements: Tensor | None = None,
    chunks: Sequence[int] | None = None,
    floor: float = NORMALISER_FLOOR,
) -> Tensor:
    """Surrogate whose gradient with respect to x0 is exactly matching_direction / numel (DMD, arXiv:2311.18828, Eq. 7).

    Its value is half the mean square of the normalised direction, which stays near a constant through training: judge a
    run by `matching_statistics`. Only x0 receives a gradient.

    Args:
        x0: [B, ...] student sample, with graph.
        fake_x0: [B, ...] prediction of the fake score at x_t, without guidance.
        real_x0: [B, ...] prediction of the teacher at the same x_t, with guidance u + w (c - u).
        weight: [B] factor of each sample's gradient, for instance of an f-divergence; None is one.
        elements: [B, 1, ...] factor of each place, for instance of Stream-R1; None is one. Normalisers do not see it.
        chunks: lengths in frames of the parts of a video that have a normaliser each; None is one for the sample.
        floor: smallest normaliser. Where x0 equals real_x0 the gradient is finite, and zero where
            fake_x0 agrees too.

    Raises:
        ValueError: the shapes differ, weight is not [B], elements not [B, 1, ...], or the chunks do not add up to the
            frames.
    """
    predictions = (x0, fake_x0, real_x0)
    direction = matching_direction(*predictions, weight=weight, elements=elements, chunks=chunks, floor=floor)
    x0 = at_least_fp32(x0)
    # x0 - x0.detach() is an exact zero that carries the graph; x0 - (x0 - direction) would round the direction away.
    return 0.5 * (x0 - x0.detach() + direction).square().mean()


@torch.no_grad()
def matching_statistics(
    x0: Tensor, fake_x0: Tensor, real_x0: Tensor, *, floor: float = NORMALISER_FLOOR
) -> MatchingStatistics:
    """Diagnostics of one generator step; arguments as in `distribution_matching_loss`. Does not wait for the device.

    Raises:
        ValueError: the shapes differ.
    """
    normaliser = direction_normaliser(x0, real_x0, floor=floor)
    gradient = matching_direction(x0, fake_x0, real_x0, floor=floor)
    student, fake, teacher = at_least_fp32(x0), at_least_fp32(fake_x0), at_least_fp32(real_x0)
    return MatchingStatistics(
        direction_rms=(fake - teacher).square().mean().sqrt(),
        gradient_rms=gradient.square().mean().sqrt(),
        normaliser_mean=normaliser.mean(),
        floored_share=(normaliser <= floor).to(normaliser.dtype).mean(),
        student_mean=student.mean(),
        student_std=student.std(correction=0),
        fake_mean=fake.mean(),
        fake_std=fake.std(correction=0),
        teacher_mean=teacher.mean(),
        teacher_std=teacher.std(correction=0),
    )


def fake_score_error(velocity: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Mean square of velocity - (eps - x0) of each sample, [B]; x0 and eps are cut from their graph.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(velocity=velocity, x0=x0, eps=eps)
    target = at_least_fp32(eps.detach()) - at_least_fp32(x0.detach())
    return (at_least_fp32(velocity) - target).square().flatten(1).mean(dim=1)


def fake_score_loss(velocity: Tensor, x0: Tensor, eps: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Flow matching of the fake score on the student's samples: mean weight |velocity - (eps - x0)|^2.

    Any positive weight has the same minimiser, the velocity of the student's distribution (DMD, arXiv:2311.18828,
    Eq. 6, there in x0 form; see `fake_score_weight`).

    Args:
        velocity: [B, ...] prediction of the fake score at (1 - t) x0 + t eps, without guidance.
        x0: [B, ...] student sample; no gradient reaches it.
        eps: [B, ...] the noise of x_t.
        weight: [B], None is one.

    Raises:
        ValueError: the shapes differ, or weight is not [B].
    """
    error = fake_score_error(velocity, x0, eps)
    return error.mean() if weight is None else (expand_weight(weight, error) * error).mean()


def fake_score_weight(t: Tensor, *, target: Literal["velocity", "x0", "eps"]) -> Tensor:
    """Weight [B] that turns the velocity error into that of another prediction at the same x_t: 1, t^2 or (1 - t)^2.

    From x0 = x_t - t velocity and eps = x_t + (1 - t) velocity.

    Raises:
        ValueError: the target is unknown.
    """
    t = at_least_fp32(t)
    if target == "velocity":
        return torch.ones_like(t)
    if target == "x0":
        return t.square()
    if target == "eps":
        return (1 - t).square()
    raise ValueError(f"fake score target {target!r} is unknown; choose velocity, x0 or eps")


def regression_loss(x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """Mean squared distance to what the teacher's ODE makes of the same noise and prompt (one-step students only).

    DMD, arXiv:2311.18828, Eq. 9, which measures it with LPIPS on pixels; here in the space of the samples, usually
    latents, where no perceptual network is needed. teacher_x0 [B, ...] is cut from its graph.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, teacher_x0=teacher_x0)
    return (at_least_fp32(x0) - at_least_fp32(teacher_x0.detach())).square().mean()
