"""Mean and covariance of features, as files of this and of other packages, and the Frechet distance between two.

Shapes: features [N, D], mean [D], covariance [D, D], all float64 here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Eigenvalues of a product of covariances are never negative; rounding moves zeros by about 1e-16 of the largest one.
NEGATIVE_TOLERANCE = 1e-8
# Rows that are turned into float64 at a time: features of many images stay in float32.
CHUNK = 4096


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [D] and unbiased covariance [D, D] (float64) of the features of `samples` images.

    `samples` is None where a file of another package does not tell it, `source` what made the features.
    """

    mean: Tensor
    covariance: Tensor
    samples: int | None
    source: str

    @classmethod
    def from_features(cls, features: Tensor, *, source: str, rows: Tensor | None = None) -> FeatureStatistics:
        """Statistics of features [N, D], or of `rows` of them; raises ValueError for fewer than two."""
        count = len(features) if rows is None else len(rows)
        require_features(features, least=2)
        total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        parts = range(0, count, CHUNK)

        def part(start: int) -> Tensor:
            chosen = slice(start, start + CHUNK) if rows is None else rows[start : start + CHUNK]
            return features[chosen].double()

        for start in parts:
            total += part(start).sum(dim=0)
        mean = total / count
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
        for start in parts:
            centred = part(start) - mean
            covariance.addmm_(centred.T, centred)
        return cls(mean, covariance / (count - 1), count, source)

    def distance(self, other: FeatureStatistics) -> float:
        """Frechet distance to `other`. Raises ValueError when the features come from different sources."""
        if self.source != other.source:
            raise ValueError(
                f"statistics come from {self.source!r} and {other.source!r}; only those of one source compare"
            )
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def save(self, path: str | Path) -> None:
        """Write `mu` and `sigma` as pytorch-fid and clean-fid read them, and count and source beside them."""
        target = Path(path)
        if target.suffix != ".npz":
            raise ValueError(f"{target} must end in .npz, which other packages read")
        target.parent.mkdir(parents=True, exist_ok=True)
        # numpy appends its suffix to names without it.
        partial = target.with_name(f".{target.stem}.partial.npz")
        entries: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy()}
        entries |= {"samples": np.array(-1 if self.samples is None else self.samples), "source": np.array(self.source)}
        np.savez_compressed(partial, **entries)
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path, *, source: str) -> FeatureStatistics:
        """Read the `mu` and `sigma` of an .npz file; a file that names no source is taken for one of `source`.

        Raises ValueError for a missing file, one without these entries, with others than numbers, or of another source.
        """
        if not Path(path).is_file():
            raise ValueError(f"there are no statistics at {path}")
        try:
            # numpy reads no pickled arrays unless it is told to.
            with np.load(path) as file:
                entries = {name: np.asarray(file[name]) for name in file.files if name in _ENTRIES}
            mean, covariance = (torch.from_numpy(entries[name].astype(np.float64)) for name in ("mu", "sigma"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is no .npz file with the numbers mu and sigma: {error}") from error
        size = len(mean) if mean.ndim == 1 else -1
        if covariance.shape != (size, size) or not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(
                f"{path} holds mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; they must be finite, "
                "[D] and [D, D]"
            )
        own = str(entries["source"]) if "source" in entries else source
        if own != source:
            raise ValueError(f"{path} holds statistics of {own!r}, and {source!r} is asked for; use one protocol")
        samples = int(entries["samples"]) if "samples" in entries else -1
        return cls(mean, covariance, samples if samples > 0 else None, source)


_ENTRIES = ("mu", "sigma", "samples", "source")


def require_features(features: Tensor, *, least: int) -> None:
    """Raises ValueError unless features are [N, D] with N >= least."""
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"features have shape {tuple(features.shape)}; use [N, D] with N >= {least}")


def feature_distance(generated: Tensor, reference: Tensor) -> float:
    """Frechet distance of features [N, D] and [M, D]. Raises ValueError for fewer than two rows."""
    sides = [FeatureStatistics.from_features(side, source="") for side in (generated, reference)]
    return sides[0].distance(sides[1])


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of N(mean1, cov1) and N(mean2, cov2) in float64 (arXiv:1706.08500, Eq. 6).

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1^(1/2) cov2 cov1^(1/2))^(1/2)), means [D], covariances [D, D].
    Raises ValueError for shapes that do not fit and for matrices with clearly negative eigenvalues.
    """
    size = mean1.shape[0]
    if any(mean.shape != (size,) for mean in (mean1, mean2)) or any(cov.shape != (size, size) for cov in (cov1, cov2)):
        shapes = [tuple(tensor.shape) for tensor in (mean1, cov1, mean2, cov2)]
        raise ValueError(f"mean and covariance shapes are {shapes}; use [D], [D, D], [D], [D, D]")
    first, second = cov1.double(), cov2.double()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * _require_not_negative(values).sqrt()) @ vectors.T
    cross = _require_not_negative(torch.linalg.eigvalsh(root @ second @ root)).sqrt().sum()
    distance = (mean1.double() - mean2.double()).square().sum() + first.trace() + second.trace() - 2.0 * cross
    return distance.item()


def _require_not_negative(eigenvalues: Tensor) -> Tensor:
    largest = eigenvalues.abs().max()
    if eigenvalues.min() < -NEGATIVE_TOLERANCE * largest:
        raise ValueError(
            f"a covariance has the eigenvalue {eigenvalues.min():.3g} beside {largest:.3g}; covariances are symmetric "
            "and have none below zero"
        )
    return eigenvalues.clamp(min=0.0)
