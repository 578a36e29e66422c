"""Teacher forcing and diffusion forcing: flow matching of a causal student on given videos.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; t [B], or [B, F] with one time per chunk.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.causal_video.model.calls import condition_first_frame, per_frame
from fewstep.causal_video.stages.batch import (
    ForcingNetworks,
    ForcingStep,
    VideoBatch,
    chunk_uniform,
    isolated,
    over_frames,
)
from fewstep.causal_video.stages.losses import counted_weight, frame_loss
from fewstep.causal_video.stages.sections import (
    DiffusionForcingConfig,
    FlowConfig,
    FrameReduction,
    TeacherForcingConfig,
)
from fewstep.consistency.sample_loss import ConsistencyLoss
from fewstep.core.condition import Condition
from fewstep.core.grids import shift_time
from fewstep.core.paths import add_noise, at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.shapes import require_same_shape


def teacher_forcing_step(
    batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, stage: TeacherForcingConfig
) -> ForcingStep:
    """Flow matching of every chunk on clean earlier chunks, in one packed call (Causal-rCM, arXiv:2606.25473).

    All chunks of a sample have one time, uniform and shifted, or each has its own.
    """
    if stage.times == "chunk":
        uniform = chunk_uniform(draw, networks.layout, "forcing_chunk_time")
        t = over_frames(shift_time(uniform, stage.shift), networks.layout)
    else:
        t = shift_time(draw.uniform("forcing_time"), stage.shift)
    velocity = networks.on_context(batch)(add_noise(batch.x0, batch.eps, t), t, batch.condition)
    return flow_step(velocity, batch, t if t.ndim == 2 else per_frame(t, batch.x0.shape[2]), stage)


def diffusion_forcing_step(
    batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, stage: DiffusionForcingConfig
) -> ForcingStep:
    """Flow matching with a time of its own for every chunk; context is as noisy as it is (arXiv:2407.01392)."""
    uniform = chunk_uniform(draw, networks.layout, "forcing_chunk_time")
    if stage.times == "same":
        uniform = draw.uniform("forcing_time")[:, None].expand_as(uniform)
    elif stage.times == "fopp":
        uniform = rising_times(uniform, draw.uniform("forcing_pivot"), draw.uniform("forcing_time"))
    t = over_frames(shift_time(uniform, stage.shift), networks.layout)
    x, t = condition_first_frame(add_noise(batch.x0, batch.eps, t), t, batch.image)
    return flow_step(networks.causal_velocity(x, t, batch.condition), batch, t, stage)


def rising_times(uniform: Tensor, pivot: Tensor, time: Tensor) -> Tensor:
    """Times [B, chunks] that never fall, from uniform numbers: one chunk, uniform among them, has a uniform time, and
    the others are uniform among all sequences that do not fall through it (AR-Diffusion, arXiv:2503.07418, whose counts
    of discrete sequences these are in the limit of many timesteps): sorted uniform numbers on both sides of it.

    Args:
        uniform: [B, chunks] in [0, 1).
        pivot: [B] in [0, 1), which says the chunk.
        time: [B], of that chunk.
    """
    chunks = uniform.shape[1]
    place = (pivot * chunks).long().clamp(max=chunks - 1)[:, None]
    number, t = torch.arange(chunks, device=uniform.device)[None], time[:, None]
    before = torch.where(number < place, uniform * t, 2.0)
    after = torch.where(number > place, t + uniform * (1 - t), 2.0)
    # Sorted, those before come first, and 2 stands for all others.
    low, high = before.sort(dim=1).values, after.sort(dim=1).values
    shifted = high.gather(1, (number - place - 1).clamp(min=0))
    return torch.where(number < place, low, torch.where(number == place, t, shifted))


def flow_step(velocity: Tensor, batch: VideoBatch, t: Tensor, stage: FlowConfig) -> ForcingStep:
    """`forcing_loss` with the configured weight of times [B, F]; a given frame does not count."""
    weight = bell_weight(t) if stage.weight == "bell" else torch.ones_like(t)
    weight = weight * counted_weight(batch.frame_counts)
    found = forcing_loss(velocity, batch.x0, batch.eps, weight, frames=stage.frames)
    return ForcingStep(found.loss, {"flow_error": found.error.mean(), **isolated(found)})


def drop_captions(condition: Condition, null_condition: Condition, draw: Draw, share: float) -> Condition:
    """The captions, a share of them replaced by the empty one; controls stay."""
    if share == 0:
        return condition
    null_condition = replace(null_condition.expand(condition.batch_size), control=condition.control)
    return condition.where(draw.uniform("caption_drop") >= share, null_condition)


def drop_controls(condition: Condition, draw: Draw, share: float) -> Condition:
    """The condition with zeros for controls in a share of the samples."""
    if share == 0 or condition.control is None:
        return condition
    keep = (draw.uniform("control_drop") >= share).view(-1, 1, 1, 1)
    return condition.with_control(torch.where(keep, condition.control, 0.0))


def bell_weight(t: Tensor) -> Tensor:
    """exp(-2 (t - 1/2)^2) - exp(-1/2): 0 at t = 0 and 1 (teacher forcing in Causal-rCM, arXiv:2606.25473)."""
    t = at_least_fp32(t)
    return torch.exp(-2 * (t - 0.5).square()) - math.exp(-0.5)


def forcing_loss(
    velocity: Tensor, x0: Tensor, eps: Tensor, weight: Tensor, *, frames: FrameReduction = "mean"
) -> ConsistencyLoss:
    """Flow matching of a causal network: `frame_loss` of the velocity against eps - x0.

    Teacher forcing with one time per sample and `bell_weight`, diffusion forcing (arXiv:2407.01392) with one per chunk
    and none, both as in Causal-rCM (arXiv:2606.25473). Arguments and errors as there.
    """
    require_same_shape(velocity=velocity, x0=x0, eps=eps)
    return frame_loss(velocity, at_least_fp32(eps) - at_least_fp32(x0), weight, frames=frames)
