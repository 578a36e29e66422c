"""A reward's own gradient beside distribution matching (ReFL of arXiv:2304.05977, as DMDR, arXiv:2511.13649, adds it).

The matched sample itself is decoded and scored, and the gradient goes back through scorer and decoder: no policy, no
groups, and one call of the student. Matching holds the student to the teacher while the reward pulls.

Shapes: B samples, R scorers; x0 [B, C, h, w], rewards [R, B].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.core.teacher import Teacher
from fewstep.core.training.processes import Processes
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import ReflConfig
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.evaluation.scorers.failure import agree
from fewstep.evaluation.scorers.scorer import Scorer
from fewstep.evaluation.scorers.total import score_all


def refl_loss(rewards: Tensor, *, weights: Sequence[float], margin: float | None = None) -> Tensor:
    """sum_r weights[r] mean relu(margin - rewards[r]); without a margin - sum_r weights[r] mean rewards[r].

    Args:
        rewards: [R, B] with the graph to the samples.
        weights: one for each scorer.
        margin: a reward at or above it gives no gradient (DMDR: 0.7 for cosines of CLIP and HPSv2, never reached).

    Raises:
        ValueError: there is no graph, or another number of weights.
    """
    if not rewards.requires_grad:
        raise ValueError("the rewards carry no gradient; use differentiable scorers, without no_grad")
    if len(weights) != len(rewards):
        raise ValueError(f"{len(weights)} weights for {len(rewards)} rewards; give one each")
    lacking = -rewards if margin is None else torch.relu(margin - rewards)
    return (lacking.mean(dim=1) * rewards.new_tensor(list(weights))).sum()


class SampleReward:
    """The scorers of a run on the student's samples.

    Args:
        settings: which scorers, and how they weigh.
        trainer: of the run.
        videos: whether samples are videos; scorers of pictures then count by the mean of their frames.
        scorers: take the place of those that the settings name.

    Raises:
        ValueError: a scorer is unknown, its weights are missing, or it has no gradient.
    """

    def __init__(
        self, settings: ReflConfig, trainer: Trainer, *, videos: bool, scorers: Sequence[Scorer] | None = None
    ) -> None:
        entries, device = settings.scorers, trainer.device
        loaded = load_scorers(entries, device=device, videos=videos) if scorers is None else tuple(scorers)
        for scorer in loaded:
            if not scorer.card.differentiable:
                raise ValueError(
                    f"refl follows the reward's own gradient, and {scorer.card.name} has none: choose another scorer, "
                    "or a method of scripts/train_reward.py that compares samples"
                )
            if scorer.card.needs_video != videos:
                raise ValueError(f"refl.scorers: {scorer.card.name} judges videos, and the samples are pictures")
        self.settings, self.scorers, self.trainer = settings, loaded, trainer
        self.processes = Processes(trainer.rank, trainer.world_size)

    def loss(self, teacher: Teacher, x0: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of samples with their graph, and the mean of each reward to log.

        Raises RewardError, on every process, when a scorer fails on any.
        """
        entries, failure, parts = self.settings.scorers, None, None
        pixels = teacher.decode(x0)
        try:
            parts = score_all(self.scorers, pixels, prompts, gradient=True, chunk=self.settings.chunk)
        except Exception as error:  # Scorers are the user's code: anything can come.
            failure = error
        agree(failure, self.processes, step=self.trainer.step)
        assert parts is not None
        values = parts.values
        mean, std = (values.new_tensor([getattr(entry, key) for entry in entries])[:, None] for key in ("mean", "std"))
        rewards = (values - mean) / std
        loss = refl_loss(rewards, weights=[entry.weight for entry in entries], margin=self.settings.margin)
        means = rewards.detach().mean(dim=1)
        return loss, {f"reward_{name}": value for name, value in zip(parts.names, means, strict=True)}
