"""Losses of a batch of samples, in which a sample that is not finite does not spoil the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import expand_weight, require_same_shape

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class ConsistencyLoss:
    """A loss and what it left out.

    Attributes:
        loss: 0-dim, with graph.
        error: [B] squared distance of each sample after its reduction, without graph and without weight.
        isolated: bool [B]: samples with a nan or an infinity in network or tangent. They add 0 to loss and gradient,
            and the batch mean still divides by B, so that the others do not notice.
    """

    loss: Tensor
    error: Tensor
    isolated: Tensor

    @property
    def isolated_count(self) -> Tensor:
        """How many samples were left out: 0-dim int64 on the device. Log it; above 0 a run is not healthy."""
        return self.isolated.sum()


def finite_samples(*tensors: Tensor) -> Tensor:
    """bool [B]: the samples that are finite in each of the tensors [B, ...]."""
    finite = [tensor.detach().reshape(len(tensor), -1).isfinite().all(dim=1) for tensor in tensors]
    return torch.stack(finite).all(dim=0)


def keep_samples(values: Tensor, usable: Tensor) -> Tensor:
    """values [B, ...] with the samples that are not usable (bool [B]) set to 0, where no gradient flows either."""
    return torch.where(usable.view(-1, *([1] * (values.ndim - 1))), values, 0.0)


def reduce_sample(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean or sum of [B, ...] over all dimensions but the first: [B].

    Raises:
        ValueError: the reduction is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is unknown; choose mean or sum")
    flat = values.reshape(len(values), -1)
    return flat.mean(dim=1) if reduction == "mean" else flat.sum(dim=1)


def pseudo_huber(squares: Tensor, constant: float) -> Tensor:
    """sqrt(squares + c^2) - c of squared distances, of any shape; the gradient at 0 is 0 even for c = 0.

    Raises:
        ValueError: c is negative.
    """
    if constant < 0:
        raise ValueError(f"the constant must be 0 or more, got {constant}")
    inside = squares + constant**2
    positive = inside > 0
    return torch.where(positive, torch.where(positive, inside, 1.0).sqrt(), 0.0) - constant


def consistency_difference(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """prediction - stop(target) [B, ...] with 0 in samples that are not finite, and which are: bool [B].

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(prediction=prediction, target=target)
    prediction, target = at_least_fp32(prediction), at_least_fp32(target.detach())
    usable = finite_samples(prediction, target)
    return keep_samples(prediction - target, usable), usable


def weighted_loss(error: Tensor, usable: Tensor, weight: Tensor | None) -> ConsistencyLoss:
    """Mean over the batch of weight [B] (None is 1) times error [B]; `usable` bool [B] are the samples that count."""
    weighted = error if weight is None else keep_samples(expand_weight(weight.detach(), error) * error, usable)
    return ConsistencyLoss(weighted.mean(), error.detach(), ~usable)
