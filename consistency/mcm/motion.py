"""Motion of a video as a map of its latents, and the loss that regresses motion alone (MCM, arXiv:2406.06890).

Low-quality video teaches how things move but should not teach how they look. The consistency loss therefore compares
m(f) with m(target), and appearance is left to an image discriminator. Kinds of m, over frames:

    raw          the latents themselves
    difference   next minus previous frame; blind to a constant per pixel
    low, high    slow and fast part of the Fourier series over frames; they add up to the latents
    correlation  inner products over channels of every two frames, divided by C

Cutoff of the frequencies and scale of the correlation are our choice; the public code was the source for the rest.

Legend: B batch, C channels, F frames; latents [B, C, F, H, W]. fp32 at least, fp64 where an input is fp64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.consistency.sample_loss import pseudo_huber
from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import require_same_shape

MotionKind = Literal["raw", "difference", "low", "high", "correlation"]


def motion_map(latents: Tensor, kind: MotionKind, *, cutoff: float = 0.25) -> Tensor:
    """m(latents): [B, C, F, H, W], [B, C, F - 1, H, W] for "difference", [B, F, F, H, W] for "correlation".

    Args:
        latents: [B, C, F, H, W].
        kind: see the head of this file.
        cutoff: largest frequency of "low", as a share of the highest there is (half a period per frame).

    Raises:
        ValueError: latents are no video, the kind is unknown, or the cutoff is outside [0, 1].
    """
    if latents.ndim != 5:
        raise ValueError(f"motion needs latents [B, C, F, H, W], got shape {tuple(latents.shape)}")
    latents = at_least_fp32(latents)
    if kind == "raw":
        return latents
    if kind == "difference":
        return latents[:, :, 1:] - latents[:, :, :-1]
    if kind == "correlation":
        return torch.einsum("bcfhw,bcghw->bfghw", latents, latents) / latents.shape[1]
    if kind not in ("low", "high"):
        raise ValueError(f"motion {kind!r} is unknown; choose raw, difference, low, high or correlation")
    if not 0 <= cutoff <= 1:
        raise ValueError(f"the cutoff must lie in [0, 1], got {cutoff}")
    frames = latents.shape[2]
    spectrum = torch.fft.rfft(latents, dim=2)
    slow = torch.fft.rfftfreq(frames, device=latents.device) <= 0.5 * cutoff
    kept = slow if kind == "low" else ~slow
    return torch.fft.irfft(spectrum * kept.view(1, 1, -1, 1, 1), n=frames, dim=2)


def motion_loss(
    prediction: Tensor, target: Tensor, kind: MotionKind, *, constant: float = 1e-3, cutoff: float = 0.25
) -> Tensor:
    """Mean over all elements of sqrt((m(prediction) - m(target))^2 + c^2) - c; no gradient reaches the target.

    Raises:
        ValueError: shapes differ, c is negative, or `motion_map` raises.
    """
    require_same_shape(prediction=prediction, target=target)
    difference = motion_map(prediction, kind, cutoff=cutoff) - motion_map(target.detach(), kind, cutoff=cutoff)
    return pseudo_huber(difference.square(), constant).mean()
