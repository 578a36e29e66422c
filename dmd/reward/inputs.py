"""Checks and group statistics that the reward methods share. Legend: B samples, K samples of one prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import require_same_shape

Reduction = Literal["mean", "sum"]


def finite_values(values: Tensor, name: str) -> Tensor:
    """The values [B] in fp32 at least, with their graph.

    Raises:
        ValueError: not [B], or a value is nan or infinite; the message names the samples.
    """
    if values.ndim != 1:
        raise ValueError(f"{name} must be one number a sample, [B], got shape {tuple(values.shape)}")
    values = at_least_fp32(values)
    bad = (~torch.isfinite(values.detach())).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} of samples {bad} are not finite; leave failed samples out of their group, never replace them"
        )
    return values


def over_elements(x: Tensor, reduction: Reduction) -> Tensor:
    """[B, ...] to [B]: mean or sum over all other dimensions.

    Raises:
        ValueError: the reduction is unknown.
    """
    if reduction == "mean":
        return x.flatten(1).mean(dim=1)
    if reduction == "sum":
        return x.flatten(1).sum(dim=1)
    raise ValueError(f"reduction {reduction!r} is unknown; choose mean or sum")


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """Sum of the values [B] over the samples with the same group number, [B].

    Raises:
        ValueError: group is not integer and [B].
    """
    if group.shape != values.shape or group.dtype.is_floating_point or values.ndim != 1:
        raise ValueError(
            f"group must hold an integer for each of the {len(values)} samples, got {group.dtype} {tuple(group.shape)}"
        )
    member = (group[:, None] == group[None, :]).to(values.dtype)
    return member @ values


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean of the values [B] over the samples with the same group number, [B].

    Groups must be complete: with several processes, gather first or keep each group on one of them.

    Raises:
        ValueError: group is not integer and [B].
    """
    return group_sum(values, group) / group_sum(torch.ones_like(values), group)


def group_std(values: Tensor, group: Tensor) -> Tensor:
    """Standard deviation (over K, not K - 1) of the values [B] inside each group, [B].

    Raises:
        ValueError: group is not integer and [B].
    """
    return group_mean((values - group_mean(values, group)).square(), group).sqrt()


def reference_penalty(prediction: Tensor, reference_prediction: Tensor) -> Tensor:
    """mean |prediction - reference|^2 of each sample, [B]; no gradient reaches the reference.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(prediction=prediction, reference_prediction=reference_prediction)
    difference = at_least_fp32(prediction) - at_least_fp32(reference_prediction.detach())
    return over_elements(difference.square(), "mean")
