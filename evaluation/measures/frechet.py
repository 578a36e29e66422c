"""Frechet distances of features: FID and FD-DINOv2, their errors, and what remains at infinitely many images.

Shapes: generated features [N, D], reference features [M, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.evaluation.measures.statistics import CHUNK, FeatureStatistics, frechet_distance, require_features

# Of the line through FID over 1 / N (arXiv:1911.07023, section 4): its number of points, and the smallest N over the
# whole one. There they are 5,000 of 50,000, which is 2.4 for each of 2,048 features: fewer are no line yet.
LINE_POINTS = 15
LINE_START, PER_FEATURE = 0.1, 2.4
LEAST_OF_LINE = 40


def distance_influences(generated: Tensor, reference: FeatureStatistics | Tensor) -> tuple[Tensor, Tensor | None]:
    """How much each image [N], and each reference picture [M], moves the Frechet distance: see `Error`.

    The derivative of the distance in the first mean is 2 (m1 - m2) and in the first covariance 1 - T, with T the map
    that carries N(0, C1) to N(0, C2), so a row x has 2 (m1 - m2) (x - m1) + (x - m1) (1 - T) (x - m1); likewise for the
    other side. Directions in which a covariance has nothing (fewer rows than features) are left out.
    """
    one = FeatureStatistics.from_features(generated, source="")
    other = FeatureStatistics.from_features(reference, source="") if isinstance(reference, Tensor) else reference
    images = _influences(generated, one, other)
    return images, _influences(reference, other, one) if isinstance(reference, Tensor) else None


def _influences(rows: Tensor, own: FeatureStatistics, other: FeatureStatistics) -> Tensor:
    values, vectors = torch.linalg.eigh(own.covariance)
    kept = values > values.max() * 1e-10
    root, inverse = ((vectors[:, kept] * values[kept].pow(power)) @ vectors[:, kept].T for power in (0.5, -0.5))
    inner_values, inner_vectors = torch.linalg.eigh(root @ other.covariance @ root)
    middle = (inner_vectors * inner_values.clamp(min=0.0).sqrt()) @ inner_vectors.T
    change = vectors[:, kept] @ vectors[:, kept].T - inverse @ middle @ inverse
    parts = []
    for start in range(0, len(rows), CHUNK):
        centred = rows[start : start + CHUNK].double() - own.mean
        parts.append(2.0 * centred @ (own.mean - other.mean) + ((centred @ change) * centred).sum(dim=1))
    found = torch.cat(parts)
    return (found - found.mean()).cpu()


def distance_at_infinity(generated: Tensor, reference: FeatureStatistics, *, seed: int) -> float:
    """The Frechet distance that infinitely many generated images would have: FID-infinity (arXiv:1911.07023, Eq. 8).

    The distance of N images is a line in 1 / N up to higher orders; its value at 0 is read off a fit through
    `LINE_POINTS` counts up to all images, each of a random choice of them: from a tenth of the images, or from 2.4 per
    feature where that is more and less than half of them. The paper draws the images by quasi-random noise as well,
    which an evaluation of given images cannot. The reference stays finite.
    Raises ValueError for fewer than `LEAST_OF_LINE` images.
    """
    require_features(generated, least=LEAST_OF_LINE)
    generator = torch.Generator().manual_seed(seed)
    total = len(generated)
    start = max(4.0, LINE_START * total, min(PER_FEATURE * generated.shape[1], total / 2))
    counts = torch.linspace(start, total, LINE_POINTS).round().long().tolist()
    values = []
    for count in counts:
        rows = torch.randperm(total, generator=generator)[:count]
        one = FeatureStatistics.from_features(generated, source="", rows=rows)
        values.append(frechet_distance(reference.mean, reference.covariance, one.mean, one.covariance))
    places = torch.stack([torch.ones(LINE_POINTS), 1.0 / torch.tensor(counts)], dim=1).double()
    line = torch.linalg.lstsq(places, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return line[0, 0].item()
