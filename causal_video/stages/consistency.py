"""Consistency on clean context, discrete (tf_dcm) and in continuous time (tf_scm), and the check of its tangent.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; t [B].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.stages.batch import (
    ForcingNetworks,
    ForcingStep,
    PackedNetwork,
    VideoBatch,
    frame_factor,
    isolated,
)
from fewstep.causal_video.stages.config import FlowMapStage
from fewstep.causal_video.stages.sections import TfDcmConfig, TfScmConfig
from fewstep.causal_video.stages.setup import CausalSetup
from fewstep.consistency.methods.dcm import consistency_distillation_loss, teacher_step
from fewstep.consistency.methods.scm import (
    Tangent,
    discrete_tangent,
    flow_tangent,
    normalise_tangent,
    scm_loss,
    tangent_warmup,
)
from fewstep.consistency.tangents import PathCheck, central_derivative, path_check, total_derivative
from fewstep.consistency.times import grid_times, logit_normal, mix_max_time, skipped_times
from fewstep.core.families.family import network_dtype
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw, sample_noise
from fewstep.core.training.trainer import Trainer
from fewstep.kernels.check_jvp import check_jvp

# Of the two samples on which the tangent is checked before the first step.
CHECKED_TIMES = (0.3, 0.7)


def tf_dcm_step(batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, stage: TfDcmConfig) -> ForcingStep:
    """Discrete consistency on clean context: x0 before and after one Euler step of the causal teacher (Causal-rCM)."""
    uniform = draw.uniform("consistency_grid")
    if stage.skip is None:
        times = grid_times(uniform, steps=stage.grid_steps, shift=stage.grid_shift)
    else:
        times = skipped_times(uniform, skip=stage.skip, shift=stage.grid_shift)
    x_t = add_noise(batch.x0, batch.eps, times.t)
    x_r = teacher_step(x_t, teacher_velocity(networks, x_t, times.t, batch), times.t, times.r)
    target_network = networks.on_context(batch, bare=True)
    if networks.average is not None:
        target_network = PackedNetwork(networks.average, batch, networks.packed)
    wrapped = networks.on_context(batch)
    with torch.no_grad():
        target = x0_from_velocity(x_r, target_network(x_r, times.r, batch.condition), times.r)
    prediction = x0_from_velocity(x_t, wrapped(x_t, times.t, batch.condition), times.t)
    # The velocity of a given frame is nothing, and so would be its prediction here.
    counts = batch.frame_counts[:, None, :, None, None]
    found = consistency_distillation_loss(torch.where(counts, prediction, 0.0), torch.where(counts, target, 0.0))
    return ForcingStep(found.loss * frame_factor(batch, stage.frames), {"jump": found.error.mean(), **isolated(found)})


def tf_scm_step(batch: VideoBatch, networks: ForcingNetworks, *, draw: Draw, stage: TfScmConfig) -> ForcingStep:
    """Continuous-time consistency on clean context, in rectified flow's coordinates (Causal-rCM, arXiv:2606.25473).

    The clean half is a constant of the tangent: g = -(v - v_T) - r t dv/dt, with dv/dt through the packed mask.
    """
    t = logit_normal(draw.noise((), "consistency_time"), mean=stage.time_mean, std=stage.time_std)
    t = mix_max_time(t, draw.uniform("consistency_max_time"), share=stage.max_time_share)
    x_t = add_noise(batch.x0, batch.eps, t)
    target = teacher_velocity(networks, x_t, t, batch)
    warmup = tangent_warmup(batch.step, stage.tangent_warmup)
    wrapped = networks.on_context(batch)
    # What the tangent needs comes before the graph is built, so that its memory is free again.
    if stage.tangent == "discrete":
        before, s = one_step_before(batch, networks, x_t, t, target=target, step=stage.central_step)
        velocity = wrapped(x_t, t, batch.condition)
        tangent = discrete_tangent(velocity.detach(), before, target, t, s, warmup=warmup)
    else:
        derivative = path_derivative(batch, networks, x_t, t, dx=target, stage=stage)
        velocity = wrapped(x_t, t, batch.condition)
        tangent = flow_tangent(velocity.detach(), target, derivative, t, warmup=warmup)
    counts = batch.frame_counts[:, None, :, None, None]
    direction = normalise_tangent(torch.where(counts, tangent.total, 0.0), constant=stage.normalizer)
    # Summed, since the direction has a length of at most 1 at any size; see `scm_step`.
    found = scm_loss(velocity, direction, reduction="sum")
    return ForcingStep(found.loss, {**tangent_record(tangent), **isolated(found)})


def path_derivative(
    batch: VideoBatch, networks: ForcingNetworks, x_t: Tensor, t: Tensor, *, dx: Tensor, stage: TfScmConfig
) -> Tensor:
    """d velocity / dt [B, C, F, h, w] of the noisy half along (dx, 1), by the configured method."""
    packed = networks.on_context(batch, bare=True)

    def function(x: Tensor, time: Tensor) -> Tensor:
        return packed(x, time, batch.condition)

    if stage.tangent == "jvp":
        return total_derivative(function, x_t, t, dx, torch.ones_like(t)).derivative
    step = stage.central_step
    return central_derivative(function, x_t, t, dx, torch.ones_like(t), step=step, interval=(0.0, 1.0))


@torch.no_grad()
def one_step_before(
    batch: VideoBatch, networks: ForcingNetworks, x_t: Tensor, t: Tensor, *, target: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """(v_s, s): the student's velocity one Euler step of the teacher away, at s = max(t - step, 0)."""
    s = (t - step).clamp(min=0.0)
    packed = networks.on_context(batch, bare=True)
    return packed(teacher_step(x_t, target, t, s), s, batch.condition), s


def teacher_velocity(networks: ForcingNetworks, x_t: Tensor, t: Tensor, batch: VideoBatch) -> Tensor:
    """The causal teacher's guided velocity; a given frame stands still."""
    assert networks.teacher is not None
    velocity = networks.teacher.velocity(x_t, t, batch.on_clean, networks.packed)
    return torch.where(batch.frame_counts[:, None, :, None, None], velocity, 0.0)


def tangent_record(tangent: Tangent) -> dict[str, Tensor]:
    """Lengths of the tangent and of its two parts, means over the batch."""
    lengths = {"tangent": tangent.total, "tangent_gap": tangent.gap, "tangent_drift": tangent.drift}
    return {name: part.flatten(1).norm(dim=1).mean() for name, part in lengths.items()}


def check_tangent(
    stage: TfScmConfig | FlowMapStage, setup: CausalSetup, trainer: Trainer, *, section: str = "tf_scm"
) -> str | None:
    """Compare the packed network's tangent with differences; what was found, as text, or None where none is asked for.

    Networks of two times are checked with half of each time as the second. `section` names the settings in messages.

    Raises:
        ValueError: the tangent is not the derivative of the network.
    """
    if stage.tangent != "jvp" or not stage.check_tangent:
        return None
    assert setup.networks is not None
    x0, condition = setup.videos(list(range(len(CHECKED_TIMES))), trainer.device)
    t = torch.tensor(CHECKED_TIMES, device=trainer.device)
    batch = VideoBatch(x0, x0, condition, x0, None, None, 0)
    # A wrapper of its own, around which no trainer has put autocast: the rounding of bf16 is far beyond the check's.
    bare = CausalWan(setup.student.transformer)
    packed, dtype = PackedNetwork(bare, batch, setup.networks.packed), network_dtype(bare.transformer)
    end = (t / 2,) if bare.has_two_times else ()
    found = []
    # Steps of time are small, since the network gets a thousand times as much.
    for name, tangents, step, halvings in (
        ("the state", (x0.flip(0), None), 2.0**-3, 12),
        ("time", (None, torch.ones_like(t)), 2.0**-8, 10),
    ):
        try:
            check = check_jvp(
                lambda x, time: packed(x, time, condition, *end),
                (x0, t),
                tangents,
                dtype=dtype,
                largest_step=step,
                halvings=halvings,
            )
        except ValueError as error:
            raise ValueError(f"along {name}: {error}: set {section}.tangent to 'central'") from error
        found.append(f"{check.error:.1e} along {name}")
    path = require_followed_path(section, setup, bare, trainer)
    return f"tangent of the packed network against differences: off by {', '.join(found)}; {path.words}"


def require_followed_path(section: str, setup: CausalSetup, bare: CausalWan, trainer: Trainer) -> PathCheck:
    """How well the derivative along the causal teacher's path, or that of the data without one, is that of the path.

    Raises ValueError where it follows a wiggle of the network.
    """
    assert setup.networks is not None
    rows = list(range(len(CHECKED_TIMES)))
    x0, condition = setup.videos(rows, trainer.device)
    t = torch.tensor(CHECKED_TIMES, device=trainer.device)
    eps = sample_noise(trainer.run.seed, rows, tuple(x0.shape[1:]), stream="path_check", device=trainer.device)
    batch = VideoBatch(x0, eps, condition, x0, None, None, 0)
    x_t = add_noise(x0, eps, t)
    direction = eps - x0 if setup.networks.teacher is None else teacher_velocity(setup.networks, x_t, t, batch)
    packed, times = PackedNetwork(bare, batch, setup.networks.packed), (t, t / 2) if bare.has_two_times else (t,)
    return path_check(lambda x, *at: packed(x, at[0], condition, *at[1:]), x_t, times, direction).required(section)
