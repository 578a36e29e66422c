"""Several scorers as one reward: their weighted sum, with the parts kept for the log.

Sums whose parts are normalised per group of samples first (GDPO) are in `dmd/reward/groups.py`, from the same parts.

Shapes: B samples, R scorers, values [R, B].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.evaluation.scorers.scorer import Scorer, reward_of, score
from fewstep.evaluation.scorers.settings import ScorerConfig


@dataclass(frozen=True)
class RewardParts:
    """Rewards [R, B] of R scorers, signed so that higher is better, and the scorers' names."""

    names: tuple[str, ...]
    values: Tensor

    def means(self) -> dict[str, float]:
        """The mean reward of each scorer, for the log."""
        return dict(zip(self.names, self.values.detach().double().mean(dim=1).tolist(), strict=True))


def weighted_sum(values: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_r weights[r] values[r], [B]. Raises ValueError unless there is one finite weight per row of values [R, B]."""
    if values.ndim != 2 or len(weights) != len(values) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights {list(weights)} for values {tuple(values.shape)}; give one finite number per row")
    return (values * values.new_tensor(list(weights))[:, None]).sum(dim=0)


def normalised_scores(values: Tensor, entries: Sequence[ScorerConfig]) -> Tensor:
    """(score - mean) / std of rewards [R, B], by the settings of their scorers."""
    mean, std = (values.new_tensor([getattr(entry, name) for entry in entries])[:, None] for name in ("mean", "std"))
    return (values - mean) / std


def score_all(
    scorers: Sequence[Scorer], pixels: Tensor, prompts: list[str], *, gradient: bool = False, chunk: int | None = None
) -> RewardParts:
    """The parts of every scorer, through the checked call.

    Raises:
        ValueError: there is no scorer, two have one name, or one of them fails (`score`).
    """
    names = tuple(scorer.card.name for scorer in scorers)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"scorers are {list(names)}; give at least one, each name once")
    parts = [
        reward_of(scorer.card, score(scorer, pixels, prompts, gradient=gradient, chunk=chunk)).to(pixels.device)
        for scorer in scorers
    ]
    return RewardParts(names, torch.stack(parts))
