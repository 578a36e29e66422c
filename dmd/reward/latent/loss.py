"""Losses of a latent reward model: what it says of a noisy latent against the reward of the clean one.

The models of Flash-DMD (arXiv:2511.20549) and Euphonium (arXiv:2602.04928) are not described in what was at hand; both
objectives are our reading. Legend: B batch; scores, rewards [B]; groups [B] integer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import require_same_shape
from fewstep.dmd.reward.inputs import finite_values


def latent_regression_loss(scores: Tensor, rewards: Tensor) -> Tensor:
    """mean (score - reward)^2, 0-dim; its minimiser at (x_t, t, c) is E[reward(x0) | x_t, c].

    Raises:
        ValueError: the shapes differ, or a number is not finite.
    """
    require_same_shape(scores=scores, rewards=rewards)
    difference = finite_values(at_least_fp32(scores), "scores") - finite_values(at_least_fp32(rewards), "rewards")
    return difference.square().mean()


def bradley_terry_loss(scores: Tensor, rewards: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of sigmoid(s_i - s_j) against sigmoid((r_i - r_j) / temperature), a mean over the pairs of groups.

    Its minimiser ranks states as a judge of that temperature ranks their clean samples, on average over those; a
    constant per group is free. Pairs of clean samples without noise reach s = r / temperature. The smaller the
    temperature, the more certain is the winner of a pair.

    Raises:
        ValueError: the shapes differ, a number is not finite, no group has two members, or temperature is not positive.
    """
    require_same_shape(scores=scores, rewards=rewards, groups=groups)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    first, second = group_pairs(groups)
    scores, rewards = finite_values(at_least_fp32(scores), "scores"), finite_values(at_least_fp32(rewards), "rewards")
    wins = torch.sigmoid((rewards[first] - rewards[second]) / temperature)
    return functional.binary_cross_entropy_with_logits(scores[first] - scores[second], wins.to(scores.dtype))


def group_pairs(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (i, j), i < j, of all pairs of one group. Raises ValueError when there is none."""
    first, second = torch.triu_indices(len(groups), len(groups), offset=1, device=groups.device)
    same = groups[first] == groups[second]
    if not bool(same.any()):
        raise ValueError("no group has two members, so there is no pair; give whole groups")
    return first[same], second[same]


def correlation(scores: Tensor, rewards: Tensor) -> float:
    """Pearson's, in [-1, 1]; 0 where one of the two does not vary.

    Raises:
        ValueError: the shapes differ, or a number is not finite.
    """
    require_same_shape(scores=scores, rewards=rewards)
    a, b = (finite_values(values, "values").double() for values in (scores, rewards))
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if float(scale) > 0 else 0.0


def pair_accuracy(scores: Tensor, rewards: Tensor, groups: Tensor) -> float:
    """Share of the pairs of a group with different rewards that the scores order alike; equal scores count half.

    Raises:
        ValueError: the shapes differ, or no pair of a group differs in its rewards.
    """
    require_same_shape(scores=scores, rewards=rewards, groups=groups)
    first, second = group_pairs(groups)
    told, truth = (values[first] - values[second] for values in (scores, rewards))
    differs = truth != 0
    if not bool(differs.any()):
        raise ValueError("all rewards of a group are equal, so there is no order to find; give more samples")
    agreement = (told.sign() * truth.sign())[differs].double()
    return float((agreement + 1).mean() / 2)
