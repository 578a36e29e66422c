"""How much of the generated set lies among the real pictures, and how much of them it covers, by nearest neighbours.

Shapes: generated [N, D], reference [M, D]; shares per row [N] or [M].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluation.measures.statistics import require_features

BLOCK = 1024
# arXiv:1904.06991, section 3.2, and arXiv:2002.09797, section 4.
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


@dataclass(frozen=True)
class NeighbourRows:
    """What each row says: `of_images` [N] are averaged for precision or density, `of_references` [M] for recall or
    coverage.
    """

    of_images: Tensor
    of_references: Tensor


def precision_recall(generated: Tensor, reference: Tensor, *, neighbours: int = PRECISION_NEIGHBOURS) -> NeighbourRows:
    """Improved precision and recall (arXiv:1904.06991, Eq. 2 and 3): rows are 1 or 0.

    An image counts when it lies within the distance of some real picture to its `neighbours`-th neighbour among the
    real ones; a real picture likewise among the generated ones. Raises ValueError for fewer than neighbours + 1 rows.
    """
    inside = _ball_counts(generated, reference, radii=_radii(reference, neighbours))
    covered = _ball_counts(reference, generated, radii=_radii(generated, neighbours))
    return NeighbourRows((inside > 0).double(), (covered > 0).double())


def density_coverage(generated: Tensor, reference: Tensor, *, neighbours: int = DENSITY_NEIGHBOURS) -> NeighbourRows:
    """Density and coverage (arXiv:2002.09797, Eq. 3 and 4): balls of real pictures around each image over
    `neighbours`, and whether a real picture's ball holds an image. Density may exceed 1.
    """
    radii = _radii(reference, neighbours)
    balls = _ball_counts(generated, reference, radii=radii).double() / neighbours
    return NeighbourRows(balls, (nearest_distance(reference, generated) <= radii).double())


def nearest_distance(points: Tensor, others: Tensor) -> Tensor:
    """Distance of each of the points [N, D] to the nearest of the others [M, D]: [N]."""
    return torch.cat([_distances(part, others).amin(dim=1) for part in points.split(BLOCK)])


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its `neighbours`-th other row."""
    require_features(features, least=neighbours + 1)
    # The row itself is the nearest one.
    parts = [_distances(part, features).kthvalue(neighbours + 1, dim=1).values for part in features.split(BLOCK)]
    return torch.cat(parts)


def _ball_counts(points: Tensor, centres: Tensor, *, radii: Tensor) -> Tensor:
    """In how many balls around the centres each point lies."""
    return torch.cat([(_distances(part, centres) <= radii).sum(dim=1) for part in points.split(BLOCK)])


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # Not by matrix products, which lose small distances to rounding: a row must have distance 0 to itself.
    return torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")
