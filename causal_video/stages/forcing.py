"""What a causal student minimises on given videos: flow matching, consistency, regression on trajectories.

Networks are called here, arithmetic is in the loss files.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; t [B], or [B, F] with one time per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.calls import CallOutput, condition_first_frame, per_frame, whole_call
from fewstep.causal_video.model.controls import controls_of
from fewstep.causal_video.stages.batch import CausalTeacher, PackedNetwork, VideoBatch, chunk_uniform, over_frames
from fewstep.causal_video.stages.config import CausalLossConfig
from fewstep.causal_video.stages.losses import bell_weight, counted_weight, forcing_loss
from fewstep.consistency.sample_loss import ConsistencyLoss
from fewstep.core.condition import Condition
from fewstep.core.grids import shift_time
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw
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


def frame_factor(batch: VideoBatch, loss: CausalLossConfig) -> float:
    """What turns a mean over frames into the configured reduction."""
    return float(batch.x0.shape[2]) if loss.frames == "sum" else 1.0


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
