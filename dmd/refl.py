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
from fewstep.evaluation.scorers.chunks import through_chunks
from fewstep.evaluation.scorers.failure import agree
from fewstep.evaluation.scorers.frames import FrameScore
from fewstep.evaluation.scorers.scorer import Scorer, require_prompts
from fewstep.evaluation.scorers.total import normalised_scores, score_all


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
        scorers: as loaded for pictures.

    Raises:
        ValueError: a scorer has no gradient, or judges videos where the samples are pictures.
    """

    def __init__(self, settings: ReflConfig, trainer: Trainer, scorers: Sequence[Scorer], *, videos: bool) -> None:
        for scorer in scorers:
            if scorer.card.needs_video and not videos:
                raise ValueError(f"refl.scorers: {scorer.card.name} judges videos, and the samples are pictures")
        self.scorers = tuple(
            FrameScore(scorer) if videos and not scorer.card.needs_video else scorer for scorer in scorers
        )
        self.settings, self.trainer = settings, trainer
        self.processes = Processes(trainer.rank, trainer.world_size)

    def loss(self, teacher: Teacher, x0: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of samples with their graph, and the mean of each reward to log.

        Decoder and scorers hold `refl.chunk` samples at a time. Raises RewardError, on every process, when a scorer
        fails on any.
        """
        weights, seen = [entry.weight for entry in self.settings.scorers], list[Tensor]()

        def part(x: Tensor, rows: slice) -> Tensor:
            found = score_all(self.scorers, teacher.decode(x), prompts[rows], gradient=True)
            rewards = normalised_scores(found.values, self.settings.scorers)
            seen.append(rewards.detach())
            return refl_loss(rewards, weights=weights, margin=self.settings.margin) * len(x)

        failure, loss = None, x0.new_zeros(())
        try:
            loss = through_chunks(part, x0, chunk=self.settings.chunk) / len(x0)
        except Exception as error:  # Scorers are the user's code: anything can come.
            failure = error
        agree(failure, self.processes, step=self.trainer.step)
        means = torch.cat(seen, dim=1).mean(dim=1)
        names = [scorer.card.name for scorer in self.scorers]
        return loss, {f"reward_{name}": value for name, value in zip(names, means, strict=True)}


def differentiable_scorers(
    settings: ReflConfig | None, prompts: Sequence[str], scorers: Sequence[Scorer] | None, *, device: torch.device
) -> tuple[Scorer, ...]:
    """The scorers that the settings name, or those that take their place, before any network is loaded.

    Raises:
        ValueError: one is unknown, its weights are missing, it has no gradient, or it does not know a prompt.
    """
    if settings is None:
        return ()
    found = load_scorers(settings.scorers, device=device) if scorers is None else tuple(scorers)
    for scorer in found:
        if not scorer.card.differentiable:
            raise ValueError(
                f"refl follows the reward's own gradient, and {scorer.card.name} has none: choose another scorer, or a "
                "method of scripts/train_reward.py that compares samples"
            )
    require_prompts(found, prompts)
    return found
