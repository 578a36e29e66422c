"""Kernel distances of features: KID, unbiased also for sets that are balanced over classes, and CMMD.

Both are a mean of a kernel over pairs, computed in blocks of rows, so memory does not grow with the square of the
images. Repetitions are weights on the rows: a picture drawn twice must not count as a pair with itself.

Shapes: generated [N, D], reference [M, D], weights [R, N] and [R, M] (how often a row counts), values [R].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.evaluation.measures.resampling import Draws
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
    weights = tuple(torch.ones(1, len(side), dtype=torch.float64) for side in (generated, reference))
    return _kid(generated, reference, weights, strata)[0].item()


def kid_replicates(
    generated: Tensor, reference: Tensor, draws: Draws, *, strata: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """KID in each repetition [R]."""
    return _kid(generated, reference, (draws.image_counts(), draws.reference_counts()), strata)


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


def _kid(
    generated: Tensor, reference: Tensor, weights: tuple[Tensor, ...], strata: tuple[Tensor, Tensor] | None
) -> Tensor:
    for side in (generated, reference):
        require_features(side, least=2)
    first, second = weights
    labels = (None, None) if strata is None else strata
    cross = _pair_sums(generated, reference, first, second, polynomial_kernel)
    cross /= first.sum(dim=1) * second.sum(dim=1)
    return (
        _mean_of_other_pairs(generated, first, labels[0])
        + _mean_of_other_pairs(reference, second, labels[1])
        - 2.0 * cross
    )


def _mean_of_other_pairs(features: Tensor, weights: Tensor, labels: Tensor | None) -> Tensor:
    """Mean kernel of two different rows [R]; with labels, as two independent draws would have it."""
    if labels is None:
        return _other_pairs(features, weights)[0]
    whole = _pair_sums(features, features, weights, weights, polynomial_kernel)
    total = weights.sum(dim=1)
    result = whole / total**2
    for label in labels.unique():
        mine = labels == label
        if int(mine.sum()) < 2:
            raise ValueError(f"label {int(label)} has one picture; a set balanced over labels needs two of each")
        mean, inside = _other_pairs(features[mine], weights[:, mine])
        share = weights[:, mine].sum(dim=1) / total
        # Pairs of one label: out as they are counted above, with each picture and itself, and in as different ones.
        result += share**2 * mean - inside / total**2
    return result


def _other_pairs(features: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(mean kernel over pairs of different rows, sum over all pairs), each [R]."""
    whole = _pair_sums(features, features, weights, weights, polynomial_kernel)
    own = (features.double().square().sum(dim=1) / features.shape[1] + 1.0).to(weights.device) ** 3
    squares = weights.square()
    pairs = weights.sum(dim=1) ** 2 - squares.sum(dim=1)
    mean = (whole - squares @ own) / pairs
    if bool((pairs == 0.0).any()):
        # A draw that leaves one picture of a few has no pair: it counts with those of all.
        every = _other_pairs(features, torch.ones(1, len(features), dtype=torch.float64))[0]
        mean = torch.where(pairs == 0.0, every, mean)
    return mean, whole


def _pair_sums(first: Tensor, second: Tensor, left: Tensor, right: Tensor, kernel: Kernel) -> Tensor:
    """sum_ij left_i right_j k(x_i, y_j) for each row of weights [R], in blocks of rows."""
    device = first.device
    left, right = left.to(device), right.to(device)
    other = second.double()
    total = torch.zeros(len(left), dtype=torch.float64, device=device)
    for start in range(0, len(first), BLOCK):
        block = kernel(first[start : start + BLOCK].double(), other)
        total += ((left[:, start : start + BLOCK] @ block) * right).sum(dim=1)
    return total.cpu()


def clip_maximum_mean_discrepancy(generated: Tensor, reference: Tensor) -> float:
    """CMMD: 1000 times the squared distance of CLIP embeddings under a Gaussian kernel (arXiv:2401.09603, section 4).

    Embeddings are unit vectors [N, D], [M, D]. As the released code has it, each picture also pairs with itself, so the
    value is never negative and a little too high for small sets; the paper's Eq. 5 leaves these pairs out.
    """
    weights = (torch.ones(1, len(generated), dtype=torch.float64), torch.ones(1, len(reference), dtype=torch.float64))
    return _cmmd(generated, reference, weights)[0].item()


def cmmd_replicates(generated: Tensor, reference: Tensor, draws: Draws) -> Tensor:
    """CMMD in each repetition [R]."""
    return _cmmd(generated, reference, (draws.image_counts(), draws.reference_counts()))


def _cmmd(generated: Tensor, reference: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    sides, totals = (generated, reference), [side.sum(dim=1) for side in weights]

    def mean(i: int, j: int) -> Tensor:
        sums = _pair_sums(sides[i], sides[j], weights[i], weights[j], gaussian_kernel)
        return sums / (totals[i] * totals[j])

    return CMMD_SCALE * (mean(0, 0) + mean(1, 1) - 2.0 * mean(0, 1))
