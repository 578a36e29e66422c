"""Does a pipeline draw what it was asked for, and does it draw it in more than one way?

Shapes: N images, pixels [N, 3, H, W] in [0, 1], labels [N], features [N, D].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AccuracyResult:
    """Fraction of images that the classifier takes for the class that the prompt asks for.

    `reference` is the same fraction for the real images of the reference split: the ceiling of this measure.
    `per_class` has one fraction per class, None where no image of that class was asked for.
    """

    value: float
    samples: int
    reference: float
    per_class: tuple[float | None, ...]


@dataclass(frozen=True)
class DiversityResult:
    """Mean distance of the features of two images of one class; `reference` is that of the real images."""

    value: float
    reference: float


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


def within_class_diversity(features: Tensor, labels: Tensor) -> float:
    """Mean over classes of the mean Euclidean distance between two different images of that class.

    features [N, D], labels [N]. 0 means that each class is one image (collapse).
    Raises ValueError when no class has two images.
    """
    distances = []
    for label in labels.unique():
        rows = features[labels == label].double()
        if len(rows) > 1:
            distances.append(torch.pdist(rows).mean())
    if not distances:
        raise ValueError(f"no class has two of the {len(labels)} images; draw more samples to measure diversity")
    return torch.stack(distances).mean().item()
