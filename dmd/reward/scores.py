"""The reward of a step: scorers with their weights, scored in the background, and what the samples' groups make of it.

Shapes: n samples of this process, N of the whole step, R scorers; pixels [n, 3, H, W] in [0, 1], rewards [R, n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.training.processes import Processes
from fewstep.dmd.reward.config import RewardSettings
from fewstep.dmd.reward.groups import (
    Advantages,
    gather_step,
    group_advantages,
    normalised_advantages,
    summed_advantages,
)
from fewstep.dmd.reward.latent.network import LatentScorer, latent_scores
from fewstep.evaluation.scorers.failure import RewardError, agree
from fewstep.evaluation.scorers.overlap import OverlappedReward
from fewstep.evaluation.scorers.scorer import Scorer
from fewstep.evaluation.scorers.total import RewardParts, normalised_scores, score_all, weighted_sum

Pending = Callable[[], RewardParts]


class RewardModel:
    """The trained reward: sum over scorers of weight (score - mean) / std, higher is better.

    With `gradient` the scorers named in `followed`, or all, are differentiated. Raises ValueError when one of them
    cannot be, or when a scorer of pictures meets `videos` or the other way round.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        settings: RewardSettings,
        *,
        gradient: bool,
        followed: Sequence[str] = (),
        videos: bool = False,
    ) -> None:
        entries = [entry.name for entry in settings.scorers]
        self.followed = tuple(place for place, name in enumerate(entries) if not followed or name in followed)
        cards = [scorer.card for scorer in scorers]
        if any(card.needs_video != videos for card in cards):
            kinds = ("pictures", "videos") if videos else ("videos", "pictures")
            raise ValueError(f"reward.scorers: a scorer of {kinds[0]} cannot judge {kinds[1]}; choose another")
        without = [cards[place].name for place in self.followed if gradient and not cards[place].differentiable]
        if without:
            raise ValueError(
                f"this method follows the reward's own gradient, and {', '.join(without)} has none: choose another "
                "scorer, name others in direct.scorers (rtdmd, gndm), or leave out the direct term, the saliency "
                "(redmd) or the steering (euphonium)"
            )
        self.scorers, self.settings = tuple(scorers), settings
        self.weights = tuple(entry.weight for entry in settings.scorers)
        self._overlapped = OverlappedReward(scorers, chunk=settings.chunk) if settings.overlap else None

    def submit(self, pixels: Tensor, prompts: list[str]) -> Pending:
        """Start scoring, or put it off until the answer is asked for; the answer raises what the scorer raised."""
        if self._overlapped is not None:
            return self._overlapped.submit(pixels, prompts).result
        return partial(score_all, self.scorers, pixels.detach(), prompts, chunk=self.settings.chunk)

    def normalised(self, parts: RewardParts) -> Tensor:
        """(score - mean) / std, [R, n] in fp32."""
        return normalised_scores(parts.values, self.settings.scorers)

    def total(self, values: Tensor) -> Tensor:
        """The weighted sum [n] of normalised rewards [R, n]."""
        return weighted_sum(values, self.weights)

    def with_gradient(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Normalised rewards [R, n] with the graph to the pixels. Raises RewardError when a scorer fails."""
        return self.normalised(self._with_graph(self.scorers, pixels, prompts))

    def sensitivity(self, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Normalised rewards [R, n], and |d reward / d pixel| averaged over channels [R, n, (F,) H, W]; no graph stays.

        One scorer judges `chunk` samples at a time, so that one graph is alive. Raises RewardError when one fails.
        """
        size, rows = self.settings.chunk or len(prompts), []
        for scorer, entry in zip(self.scorers, self.settings.scorers, strict=True):
            parts = []
            for start in range(0, len(prompts), size):
                leaf = pixels[start : start + size].detach().requires_grad_()
                with torch.enable_grad():
                    scored = self._with_graph([scorer], leaf, prompts[start : start + size])
                    values = normalised_scores(scored.values, [entry])[0]
                    slope = torch.autograd.grad(values.sum(), leaf)[0]
                parts.append((values.detach(), slope.abs().mean(dim=1)))
            rows.append([torch.cat(column) for column in zip(*parts, strict=True)])
        values, maps = zip(*rows, strict=True)
        return torch.stack(values), torch.stack(maps)

    def _with_graph(self, scorers: Sequence[Scorer], pixels: Tensor, prompts: list[str]) -> RewardParts:
        try:
            return score_all(scorers, pixels, prompts, gradient=True, chunk=self.settings.chunk)
        except Exception as error:  # Scorers are the user's code: anything can come.
            raise RewardError(f"the reward failed ({type(error).__name__}: {error})", clean=False) from error

    def followed_total(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """The weighted sum [n] over the followed scorers alone, with the graph to the pixels.

        Raises RewardError when one fails.
        """
        entries = [self.settings.scorers[place] for place in self.followed]
        scorers = [self.scorers[place] for place in self.followed]
        values = normalised_scores(self._with_graph(scorers, pixels, prompts).values, entries)
        return weighted_sum(values, [entry.weight for entry in entries])

    def close(self) -> None:
        """Stop the background thread."""
        if self._overlapped is not None:
            self._overlapped.close()


def latent_judgement(
    scorer: LatentScorer, x_t: Tensor, t: Tensor, condition: Condition, *, gradient: bool = False
) -> Tensor:
    """The latent scores [n]. Raises RewardError where they cannot be used, as for other scorers."""
    try:
        return latent_scores(scorer, x_t, t, condition, gradient=gradient)
    except ValueError as error:
        raise RewardError(f"the latent reward failed ({error})", clean=False) from error


@dataclass(frozen=True, eq=False)
class StepRewards:
    """The rewards of a whole step: `values` [R, N] normalised, `total` [N], groups [N], advantages [N] (float64).

    `process` [J, N] are advantages of process rewards, one row for each random step that has them.
    """

    values: Tensor
    total: Tensor
    groups: Tensor
    advantages: Advantages
    process: Tensor

    def log(self, names: Sequence[str]) -> dict[str, float]:
        """Metrics: the mean of each scorer, and how rewards differ within groups."""
        means = self.values.mean(dim=1).tolist()
        record = {f"reward_{name}": value for name, value in zip(names, means, strict=True)}
        residual = group_advantages(self.total, self.groups, scale="none").values
        record |= {"reward": self.total.mean().item(), "reward_spread": residual.square().mean().sqrt().item()}
        return {**record, "zero_share": self.advantages.zero_share}


@dataclass(frozen=True, eq=False)
class SliceRewards:
    """What the comparison says of one slice: rewards `values` [R, n], `total` [n], `advantages` [n], `process` [J, n].

    `population` [N] are the rewards of the whole step.
    """

    values: Tensor
    total: Tensor
    advantages: Tensor
    process: Tensor
    population: Tensor


def collect(pending: Sequence[Pending], processes: Processes, *, step: int) -> list[RewardParts]:
    """The parts of every slice, once all processes have theirs.

    Raises RewardError on every process when a scorer failed on any, so that none waits for one that has left.
    """
    failure: Exception | None = None
    parts: list[RewardParts] = []
    try:
        parts = [result() for result in pending]
    except Exception as error:  # Scorers are the user's code, or another process: anything can come.
        failure = error
    agree(failure, processes, step=step)
    return parts


def compare(
    reward: RewardModel, values: Tensor, process: Tensor, groups: Tensor, *, processes: Processes
) -> StepRewards:
    """Advantages of a step from this process's normalised rewards [R, n] and process rewards [J, n].

    `groups` [N] are those of the whole step. Computed from all samples in the order of their numbers on every process.
    """
    count = len(values)
    everything = gather_step(processes, torch.cat([values.cpu(), process.cpu()]))
    step_values, step_process = everything[:count], everything[count:]
    settings = reward.settings
    combine = normalised_advantages if settings.combination == "gdpo" else summed_advantages
    advantages = combine(step_values, groups, weights=reward.weights, scale=settings.scale)
    rows = [group_advantages(row, groups, scale="group").values for row in step_process]
    return StepRewards(
        values=step_values,
        total=reward.total(step_values),
        groups=groups,
        advantages=advantages,
        process=torch.stack(rows) if rows else step_values.new_zeros((0, len(groups))).double(),
    )


def rewards_of_slice(step: StepRewards, first: int, count: int, *, device: torch.device) -> SliceRewards:
    """Rows first ... first + count - 1 of a step's rewards, in fp32 on the device."""
    rows = slice(first, first + count)
    return SliceRewards(
        values=step.values[:, rows].to(device),
        total=step.total[rows].to(device),
        advantages=step.advantages.values[rows].to(device, torch.float32),
        process=step.process[:, rows].to(device, torch.float32),
        population=step.total.to(device),
    )
