"""The squared error of causal students, a frame at a time, and the weight of frames that count.

Legend: B batch, C channels, F latent frames; videos [B, C, F, h, w]; weights [B, F]. Arithmetic in
fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.causal_video.stages.sections import FrameReduction
from fewstep.consistency.sample_loss import ConsistencyLoss, finite_samples, keep_samples
from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import require_same_shape


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


def counted_weight(counts: Tensor) -> Tensor:
    """bool [B, F] as a weight with which `frame_loss` is the mean over the frames that count; 0 where none does."""
    counted = counts.to(torch.float32)
    return counted / counted.mean().clamp(min=1 / counted.numel())
