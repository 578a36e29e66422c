"""Does a pipeline draw what it was asked for, and does it draw it in more than one way?

Shapes: N images, pixels [N, 3, H, W] in [0, 1], labels [N], features [N, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@torch.no_grad()
def class_accuracy(classifier: nn.Module, pixels: Tensor, *, labels: Tensor) -> tuple[float, list[float | None]]:
    """(accuracy over all images, accuracy per class) in [0, 1]; `classifier` gives logits [N, classes].

    Raises ValueError when counts differ or are zero.
    """
    if labels.ndim != 1 or len(labels) != len(pixels) or len(labels) == 0:
        raise ValueError(
            f"{tuple(labels.shape)} labels for {len(pixels)} images; use one label per image, at least one"
        )
    logits = torch.cat([classifier(part) for part in pixels.split(256)])
    right = (logits.argmax(dim=1) == labels).double()
    of_class = (right[labels == number] for number in range(logits.shape[1]))
    per_class = [part.mean().item() if len(part) else None for part in of_class]
    return right.mean().item(), per_class


@dataclass(frozen=True)
class PairDistances:
    """Distances of the features of two images of one class: for each class its rows [n] and their distances [n, n]."""

    rows: tuple[Tensor, ...]
    distances: tuple[Tensor, ...]

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> PairDistances:
        """From features [N, D] and labels [N]. Raises ValueError when no class has two images."""
        rows = tuple((labels == label).nonzero()[:, 0] for label in labels.unique())
        rows = tuple(one for one in rows if len(one) > 1)
        if not rows:
            raise ValueError(f"no class has two of the {len(labels)} images; draw more samples to measure diversity")
        exact = "donot_use_mm_for_euclid_dist"
        own = [features[one].double().cpu() for one in rows]
        return cls(rows, tuple(torch.cdist(part, part, compute_mode=exact) for part in own))

    def means(self, weights: Tensor) -> Tensor:
        """The mean over classes of the mean distance of two different images [R], each image counted as often as
        `weights` [R, N] says; an image that counts twice is no pair with itself.
        """
        found = []
        for rows, distances in zip(self.rows, self.distances, strict=True):
            own = weights[:, rows].double()
            pairs = own.sum(dim=1) ** 2 - own.square().sum(dim=1)
            # A draw that leaves one image of a class has no pair of it: it counts with the pairs of all.
            every = distances.sum() / (len(rows) * (len(rows) - 1))
            found.append(torch.where(pairs == 0.0, every, ((own @ distances) * own).sum(dim=1) / pairs))
        return torch.stack(found).mean(dim=0)

    def mean(self) -> float:
        """The same with every image once: 0 means that each class is one image (collapse)."""
        most = 1 + max(int(rows.max()) for rows in self.rows)
        return self.means(torch.ones(1, most)).item()
