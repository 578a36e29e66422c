"""Kernel distances of features: KID, unbiased also for sets that are balanced over classes, and CMMD.

Both are a mean of a kernel over pairs, computed in blocks of rows, so memory does not grow with the square of the
images.

Shapes: generated [N, D], reference [M, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.evaluation.measures.statistics import require_features

BLOCK = 1024
# arXiv:2401.09603, section 4: the width of the Gaussian kernel on unit vectors, and the factor of the printed figure.
CMMD_WIDTH = 10.0
CMMD_SCALE = 1000.0

Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x y / D + 1)^3, [N, M] (arXiv:1801.01401, section 4)."""
    return (first @ second.T / first.shape[1] + 1.0) ** 3


def gaussian_kernel(first: Tensor, second: Tensor) -> Tensor:
    """exp(-|x - y|^2 / (2 width^2)), [N, M] (arXiv:2401.09603, Eq. 6)."""
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1) - 2.0 * first @ second.T
    return (-squares / (2.0 * CMMD_WIDTH**2)).exp()


def kernel_inception_distance(
    generated: Tensor, reference: Tensor, *, strata: tuple[Tensor, Tensor] | None = None
) -> float:
    """KID of all images: the unbiased estimate of the squared distance (arXiv:1801.01401, Eq. 4), kernel of degree 3.

    `strata` ([N], [M]) are labels of sets whose counts per label are fixed, such as as many of each class. Two images
    of such a set are of one class less often than two independent ones, which makes the usual estimate too low. With
    labels, pairs of one class weigh (n_c / n)^2, which is the probability of independent draws: unbiased again.
    Without labels the value is that of one subset of all images; packages that average subsets of 1,000 estimate the
    same with more noise. Raises ValueError for fewer than two rows, or two of a label.
    """
    for side in (generated, reference):
        require_features(side, least=2)
    labels = (None, None) if strata is None else strata
    return (
        _mean_of_other_pairs(generated, labels[0])
        + _mean_of_other_pairs(reference, labels[1])
        - 2.0 * _pair_sum(generated, reference, polynomial_kernel) / (len(generated) * len(reference))
    )


def kid_influences(
    generated: Tensor, reference: Tensor, *, strata: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """How much each image [N], and each reference picture [M], moves KID: see `Error` of `resampling`.

    Twice the mean kernel to the other rows of its own set minus that to the other set.
    """
    labels = (None, None) if strata is None else strata
    return (
        _influences(generated, reference, labels[0], polynomial_kernel),
        _influences(reference, generated, labels[1], polynomial_kernel),
    )


def cmmd_influences(generated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The same of CMMD."""
    sides = (generated, reference), (reference, generated)
    first, second = (CMMD_SCALE * _influences(*side, None, gaussian_kernel) for side in sides)
    return first, second


def _influences(own: Tensor, other: Tensor, labels: Tensor | None, kernel: Kernel) -> Tensor:
    strata = torch.zeros(len(own), dtype=torch.int64) if labels is None else labels
    counts = torch.bincount(strata)[strata].double()
    found = []
    for start in range(0, len(own), BLOCK):
        rows = slice(start, start + BLOCK)
        inside = kernel(own[rows].double(), own.double()).cpu()
        alike = strata[rows][:, None] == strata
        alike[torch.arange(len(inside)), torch.arange(start, start + len(inside))] = False
        # The share of a row's label is divided over the other rows of it.
        same = (inside * alike).sum(dim=1) / (counts[rows] - 1.0) * counts[rows] / len(own)
        others = (inside * (strata[rows][:, None] != strata)).sum(dim=1) / len(own)
        across = kernel(own[rows].double(), other.double()).mean(dim=1).cpu()
        found.append(2.0 * (same + others - across))
    values = torch.cat(found)
    return values - values.mean()


def _mean_of_other_pairs(features: Tensor, labels: Tensor | None) -> float:
    """Mean kernel of two different rows; with labels, as two independent draws would have it."""
    count = len(features)
    if labels is None:
        return (_pair_sum(features, features, polynomial_kernel) - _own_sum(features)) / (count * (count - 1))
    result = _pair_sum(features, features, polynomial_kernel) / count**2
    for label in labels.unique():
        rows = features[labels == label]
        if len(rows) < 2:
            raise ValueError(f"label {int(label)} has one picture; a set balanced over labels needs two of each")
        # Pairs of one label: out as they are counted above, with each picture and itself, and in as different ones.
        whole = _pair_sum(rows, rows, polynomial_kernel)
        mean = (whole - _own_sum(rows)) / (len(rows) * (len(rows) - 1))
        result += (len(rows) / count) ** 2 * mean - whole / count**2
    return result


def _own_sum(features: Tensor) -> float:
    """The kernel of each row with itself, summed."""
    return ((features.double().square().sum(dim=1) / features.shape[1] + 1.0) ** 3).sum().item()


def _pair_sum(first: Tensor, second: Tensor, kernel: Kernel) -> float:
    """The kernel summed over all pairs, in blocks of rows."""
    other = second.double()
    return sum(kernel(block.double(), other).sum().item() for block in first.split(BLOCK))


def clip_maximum_mean_discrepancy(generated: Tensor, reference: Tensor) -> float:
    """CMMD: 1000 times the squared distance of CLIP embeddings under a Gaussian kernel (arXiv:2401.09603, section 4).

    Embeddings are unit vectors [N, D], [M, D]. As the released code has it, each picture also pairs with itself, so the
    value is never negative and a little too high for small sets; the paper's Eq. 5 leaves these pairs out.
    """

    def mean(first: Tensor, second: Tensor) -> float:
        return _pair_sum(first, second, gaussian_kernel) / (len(first) * len(second))

    own = mean(generated, generated) + mean(reference, reference)
    return CMMD_SCALE * (own - 2.0 * mean(generated, reference))
