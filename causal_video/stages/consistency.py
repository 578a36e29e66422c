from __future__ import annotations

import torch
from torch import Tensor

from fewstep.causal_video.stages.batch import VideoBatch
from fewstep.causal_video.stages.config import CausalLossConfig
from fewstep.causal_video.stages.forcing import ForcingNetworks, ForcingTurn, frame_factor, isolated, packed_network
from fewstep.consistency.methods.dcm import consistency_distillation_loss, teacher_step
from fewstep.consistency.methods.scm import Tangent, flow_tangent, normalise_tangent, scm_loss, tangent_warmup
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.times import grid_times, logit_normal, mix_max_time
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw


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


def teacher_velocity(networks: ForcingNetworks, x_t: Tensor, t: Tensor, batch: VideoBatch) -> Tensor:
    """The causal teacher's guided velocity; a given frame stands still."""
    assert networks.teacher is not None
    assert networks.packed is not None
    velocity = networks.teacher.velocity(x_t, t, batch, networks.packed)
    return torch.where(batch.frame_counts[:, None, :, None, None], velocity, 0.0)


def tangent_record(tangent: Tangent) -> dict[str, Tensor]:
    """Lengths of the tangent and of its two parts, means over the batch."""
    lengths = {"tangent": tangent.total, "tangent_gap": tangent.gap, "tangent_drift": tangent.drift}
    return {name: part.flatten(1).norm(dim=1).mean() for name, part in lengths.items()}
