"""How wide a teacher's samples are: over all elements, and along the thinnest and the widest directions of latents.

Matching holds a reward back with a strength that depends on this (`effective_tilt`). Shapes: latents [N, C, (F,) h, w].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentSpread:
    """Variances: over all elements, and of the narrowest and the widest of `band_variances`."""

    total: float
    thin: float
    wide: float

    @classmethod
    def of(cls, latents: Tensor) -> LatentSpread:
        """Of samples [N, C, (F,) h, w], at least two."""
        bands = band_variances(latents)
        return cls(latents.double().var().item(), bands[0].item(), bands[-1].item())


@torch.no_grad()
def band_variances(latents: Tensor, *, bands: int = 4) -> Tensor:
    """Variances of latents [N, C, (F,) h, w] in `bands` of spatial frequency for each channel, sorted: [K].

    Frequencies are those of an orthonormal cosine transform, which makes the directions of latents whose statistics do
    not depend on the place. Bands without a frequency are left out. Raises ValueError for fewer than two samples.
    """
    if len(latents) < 2:
        raise ValueError(f"{len(latents)} samples have no variance; give at least two")
    centred = latents.double() - latents.double().mean(dim=0)
    for axis in range(2, latents.ndim):
        matrix = _cosines(latents.shape[axis]).to(centred.device)
        centred = (centred.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    power = centred.square().sum(dim=0) / (len(latents) - 1)
    sizes = latents.shape[2:]
    places = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) / size for size in sizes), indexing="ij")
    radius = torch.stack(places).square().mean(dim=0).sqrt()
    band = (radius * bands).long().clamp(max=bands - 1).to(power.device)
    found = [power[:, band == number].mean(dim=1) for number in range(bands) if bool((band == number).any())]
    return torch.cat(found).sort().values


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of `size` numbers as a matrix."""
    place, order = torch.arange(size, dtype=torch.float64) + 0.5, torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * order[:, None] * place) * math.sqrt(2 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix
