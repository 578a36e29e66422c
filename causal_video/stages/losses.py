"""Losses of causal students on given videos, a frame at a time.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; t [B] or [B, F]; weights [B, F]. Arithmetic in
fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fewstep.consistency.sample_loss import ConsistencyLoss, finite_samples, keep_samples
from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import require_same_shape

FrameReduction = Literal["mean", "sum"]


def bell_weight(t: Tensor) -> Tensor:
    """exp(-2 (t - 1/2)^2) - exp(-1/2): 0 at t = 0 and 1 (teacher forcing in Causal-rCM, arXiv:2606.25473)."""
    t = at_least_fp32(t)
    return torch.exp(-2 * (t - 0.5).square()) - math.exp(-0.5)


def frame_loss(
    prediction: Tensor, target: Tensor, weight: Tensor, *, frames: FrameReduction = "mean"
) -> ConsistencyLoss:
    """mean over the batch of the mean (or sum) over frames of weight |prediction - target|^2 / (C h w).

    Causal-rCM (arXiv:2606.25473) sums over frames and multiplies by 100; the mean is the same up to a factor. Samples
    that are not finite add 0 to loss and gradient, as in `ConsistencyLoss`; its `error` is before the weight.

    Args:
        prediction: [B, C, F, h, w], with graph.
        target: the same shape; no gradient reaches it.
        weight: [B, F]; 0 leaves a frame out.
        frames: how frames are taken together.

    Raises:
        ValueError: shapes differ, the weight is not [B, F], or the reduction is unknown.
    """
    require_same_shape(prediction=prediction, target=target)
    if weight.shape != (prediction.shape[0], prediction.shape[2]):
        raise ValueError(
            f"a weight per frame must be {[prediction.shape[0], prediction.shape[2]]}, got {list(weight.shape)}"
        )
    if frames not in ("mean", "sum"):
        raise ValueError(f"frames {frames!r} is unknown; choose mean or sum")
    prediction, target = at_least_fp32(prediction), at_least_fp32(target.detach())
    usable = finite_samples(prediction, target, weight)
    error = keep_samples(prediction - target, usable).square().mean(dim=(1, 3, 4))
    weighted = keep_samples(at_least_fp32(weight.detach()), usable) * error
    total = weighted.sum(dim=1) if frames == "sum" else weighted.mean(dim=1)
    return ConsistencyLoss(total.mean(), error.detach().mean(dim=1), ~usable)


def forcing_loss(
    velocity: Tensor, x0: Tensor, eps: Tensor, weight: Tensor, *, frames: FrameReduction = "mean"
) -> ConsistencyLoss:
    """Flow matching of a causal network: `frame_loss` of the velocity against eps - x0.

    Teacher forcing with one time per sample and `bell_weight`, diffusion forcing (arXiv:2407.01392) with one per chunk
    and none, both as in Causal-rCM (arXiv:2606.25473). Arguments and errors as there.
    """
    require_same_shape(velocity=velocity, x0=x0, eps=eps)
    return frame_loss(velocity, at_least_fp32(eps) - at_least_fp32(x0), weight, frames=frames)


def counted_weight(counts: Tensor) -> Tensor:
    """bool [B, F] as a weight with which `frame_loss` is the mean over the frames that count; 0 where none does."""
    counted = counts.to(torch.float32)
    return counted / counted.mean().clamp(min=1 / counted.numel())
