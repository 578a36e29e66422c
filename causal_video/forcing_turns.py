"""What a causal student minimises on given videos: flow matching, consistency, regression on trajectories.

Networks are called here, arithmetic is in the loss files.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; t [B], or [B, F] with one time per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.causal_video.calls import CallOutput, condition_first_frame, per_frame, whole_call
from fewstep.causal_video.config import CausalLossConfig
from fewstep.causal_video.controls import controls_of
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.losses import bell_weight, counted_weight, forcing_loss, frame_loss
from fewstep.causal_video.stages import CausalTeacher, PackedNetwork, VideoBatch, chunk_uniform, over_frames
from fewstep.causal_video.stages_pairs import OdeBatch
from fewstep.consistency.discrete_loss import consistency_distillation_loss, teacher_step
from fewstep.consistency.scm_loss import (
    ConsistencyLoss,
    Tangent,
    flow_tangent,
    normalise_tangent,
    scm_loss,
    tangent_warmup,
)
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.times import grid_times, logit_normal, mix_max_time
from fewstep.core.condition import Condition
from fewstep.core.grids import shift_time
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.dmd.turns import Draw
from fewstep.kernels.mask import AttentionMask


@dataclass(frozen=True, eq=False)
class ForcingNetworks:
    """The student bare and wrapped, the masks of its calls, and the frozen causal teacher of the consistency stages.

    Forward mode does not pass through the hooks of a distributed wrapper: `student` is called for what has no gradient,
    `wrapped` for what has one. Self-forcing needs no masks.
    """

    student: nn.Module
    wrapped: nn.Module
    layout: ChunkLayout
    packed: AttentionMask | None
    causal: AttentionMask | None
    teacher: CausalTeacher | None = None


@dataclass(frozen=True, eq=False)
class ForcingTurn:
    """The student's loss, and what to log of it; 0-dim tensors without graph."""

    loss: Tensor
    record: dict[str, Tensor]


def teacher_forcing_turn(
    batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, loss: CausalLossConfig
) -> ForcingTurn:
    """Flow matching of every chunk on clean earlier chunks, in one packed call (Causal-rCM, arXiv:2606.25473).

    All chunks of a sample have one time, uniform and shifted.
    """
    t = shift_time(draw.uniform("forcing_time"), loss.shift)
    packed = packed_network(networks, batch)
    velocity = packed(add_noise(batch.x0, batch.eps, t), t, batch.condition)
    return flow_turn(velocity, batch, per_frame(t, batch.x0.shape[2]), loss)


def diffusion_forcing_turn(
    batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, loss: CausalLossConfig
) -> ForcingTurn:
    """Flow matching with a time of its own for every chunk; context is as noisy as it is (arXiv:2407.01392)."""
    uniform = chunk_uniform(draw, networks.layout, "forcing_chunk_time")
    t = over_frames(shift_time(uniform, loss.shift), networks.layout)
    x, t = condition_first_frame(add_noise(batch.x0, batch.eps, t), t, batch.image)
    velocity = causal_velocity(networks, x, t, batch.condition)
    return flow_turn(velocity, batch, t, loss)


def flow_turn(velocity: Tensor, batch: VideoBatch, t: Tensor, loss: CausalLossConfig) -> ForcingTurn:
    """`forcing_loss` with the configured weight of times [B, F]; a given frame does not count."""
    weight = bell_weight(t) if loss.weight == "bell" else torch.ones_like(t)
    weight = weight * counted_weight(batch.frame_counts)
    found = forcing_loss(velocity, batch.x0, batch.eps, weight, frames=loss.frames)
    return ForcingTurn(found.loss, {"flow_error": found.error.mean(), **isolated(found)})


def tf_dcm_turn(batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, loss: CausalLossConfig) -> ForcingTurn:
    """Discrete consistency on clean context: x0 before and after one Euler step of the causal teacher (Causal-rCM)."""
    times = grid_times(draw.uniform("consistency_grid"), steps=loss.grid_steps, shift=loss.grid_shift)
    x_t = add_noise(batch.x0, batch.eps, times.t)
    x_r = teacher_step(x_t, teacher_velocity(networks, x_t, times.t, batch), times.t, times.r)
    student = packed_network(networks, batch, bare=True)
    wrapped = packed_network(networks, batch)
    with torch.no_grad():
        target = x0_from_velocity(x_r, student(x_r, times.r, batch.condition), times.r)
    prediction = x0_from_velocity(x_t, wrapped(x_t, times.t, batch.condition), times.t)
    # The velocity of a given frame is nothing, and so would be its prediction here.
    counts = batch.frame_counts[:, None, :, None, None]
    found = consistency_distillation_loss(torch.where(counts, prediction, 0.0), torch.where(counts, target, 0.0))
    return ForcingTurn(found.loss * frame_factor(batch, loss), {"jump": found.error.mean(), **isolated(found)})


def tf_scm_turn(batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, loss: CausalLossConfig) -> ForcingTurn:
    """Continuous-time consistency on clean context, in rectified flow's coordinates (Causal-rCM, arXiv:2606.25473).

    The clean half is a constant of the tangent: g = -(v - v_T) - r t dv/dt, with dv/dt through the packed mask.
    """
    t = logit_normal(draw.noise((), "consistency_time"), mean=loss.time_mean, std=loss.time_std)
    t = mix_max_time(t, draw.uniform("consistency_max_time"), share=loss.max_time_share)
    x_t = add_noise(batch.x0, batch.eps, t)
    target = teacher_velocity(networks, x_t, t, batch)
    velocity = packed_network(networks, batch)(x_t, t, batch.condition)
    derivative = path_derivative(batch, networks, x_t, t, dx=target, loss=loss)
    warmup = tangent_warmup(batch.step, loss.tangent_warmup)
    tangent = flow_tangent(velocity.detach(), target, derivative, t, warmup=warmup)
    counts = batch.frame_counts[:, None, :, None, None]
    direction = normalise_tangent(torch.where(counts, tangent.total, 0.0), constant=loss.normalizer)
    found = scm_loss(velocity, direction)
    return ForcingTurn(found.loss * frame_factor(batch, loss), {**tangent_record(tangent), **isolated(found)})


def path_derivative(
    batch: VideoBatch, networks: ForcingNetworks, x_t: Tensor, t: Tensor, *, dx: Tensor, loss: CausalLossConfig
) -> Tensor:
    """d velocity / dt [B, C, F, h, w] of the noisy half along (dx, 1), by the configured method."""
    packed = packed_network(networks, batch, bare=True)

    def function(x: Tensor, time: Tensor) -> Tensor:
        return packed(x, time, batch.condition)

    if loss.tangent == "jvp":
        return total_derivative(function, x_t, t, dx, torch.ones_like(t)).derivative
    step = loss.central_step
    return central_derivative(function, x_t, t, dx, torch.ones_like(t), step=step, interval=(0.0, 1.0))


def ode_turn(batch: OdeBatch, networks: ForcingNetworks, *, loss: CausalLossConfig) -> ForcingTurn:
    """Regression on the end of trajectories, every chunk at a random step of its own.

    From the bidirectional teacher: block-causal, chunks at t = 0 are context and do not count (CausVid,
    arXiv:2412.07772; Self-Forcing, arXiv:2506.08009). From a causal teacher: on the clean context that its trajectories
    were made on (after Causal Forcing, arXiv:2602.02214; the packed form is our reading).
    """
    if batch.context is None:
        velocity = causal_velocity(networks, batch.x, batch.t, batch.condition)
    else:
        held = VideoBatch(batch.x0, batch.x, batch.condition, batch.context, None, None, 0)
        velocity = packed_network(networks, held)(batch.x, batch.t, batch.condition)
    prediction = x0_from_velocity(batch.x, velocity, batch.t)
    found = frame_loss(prediction, batch.x0, counted_weight(batch.t > 0), frames=loss.frames)
    return ForcingTurn(found.loss, {"regression_error": found.error.mean(), **isolated(found)})


def packed_network(networks: ForcingNetworks, batch: VideoBatch, *, bare: bool = False) -> PackedNetwork:
    """The student on a batch's clean context, wrapped for gradients unless `bare`."""
    assert networks.packed is not None
    return PackedNetwork(networks.student if bare else networks.wrapped, batch, networks.packed)


def causal_velocity(networks: ForcingNetworks, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The wrapped student's velocity under the block-causal mask, with graph."""
    extra = controls_of(condition, x.shape[2])
    output = networks.wrapped(whole_call(x, t, condition.tokens, mask=networks.causal, extra=extra))
    assert isinstance(output, CallOutput)
    return output.velocity


def teacher_velocity(networks: ForcingNetworks, x_t: Tensor, t: Tensor, batch: VideoBatch) -> Tensor:
    """The causal teacher's guided velocity; a given frame stands still."""
    assert networks.teacher is not None
    assert networks.packed is not None
    velocity = networks.teacher.velocity(x_t, t, batch, networks.packed)
    return torch.where(batch.frame_counts[:, None, :, None, None], velocity, 0.0)


def frame_factor(batch: VideoBatch, loss: CausalLossConfig) -> float:
    """What turns a mean over frames into the configured reduction."""
    return float(batch.x0.shape[2]) if loss.frames == "sum" else 1.0


def tangent_record(tangent: Tangent) -> dict[str, Tensor]:
    """Lengths of the tangent and of its two parts, means over the batch."""
    lengths = {"tangent": tangent.total, "tangent_gap": tangent.gap, "tangent_drift": tangent.drift}
    return {name: part.flatten(1).norm(dim=1).mean() for name, part in lengths.items()}


def isolated(found: ConsistencyLoss) -> dict[str, Tensor]:
    """How many samples were not finite."""
    return {"isolated_samples": found.isolated_count.float()}


def context_of_batch(x0: Tensor, draw: Draw, largest: float) -> tuple[Tensor, Tensor | None]:
    """The clean half of a packed call, noised to a uniform time up to `largest`, and that time [B] (None for 0)."""
    if largest == 0:
        return x0, None
    t = largest * draw.uniform("context_time")
    return add_noise(x0, draw.noise(tuple(x0.shape[1:]), "context_noise"), t), t


def drop_captions(condition: Condition, null_condition: Condition, draw: Draw, share: float) -> Condition:
    """The captions, a share of them replaced by the empty one; controls stay."""
    if share == 0:
        return condition
    null_condition = replace(null_condition.expand(condition.batch_size), control=condition.control)
    return condition.where(draw.uniform("caption_drop") >= share, null_condition)
