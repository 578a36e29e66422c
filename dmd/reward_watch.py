"""What is seen of a reward run beside its losses: held-out scorers, diversity, distance from the start, and in words.

Shapes: P prompts, S samples of each; pixels [P S, 3, H, W] in [0, 1], latents [P S, C, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from torch import Tensor

from fewstep.core.config import plain_values
from fewstep.core.randomness import sample_noise
from fewstep.core.roles import memory_table
from fewstep.core.trainer import Trainer
from fewstep.core.watch import GRID_SEED, Watch
from fewstep.dmd.reward_config import RewardRunConfig
from fewstep.dmd.reward_setup import RewardSetup
from fewstep.dmd.reward_turns_scores import RewardError
from fewstep.evaluation.reward_sum import RewardParts, score_all
from fewstep.evaluation.scorer import Scorer


@dataclass(frozen=True)
class Measured:
    """The mean of a score over the monitored samples, higher is better, and the standard error of that mean."""

    mean: float
    error: float

    @classmethod
    def of(cls, scores: Tensor) -> Measured:
        """From the scores [N] of the samples. Raises ValueError for fewer than two, which have no spread."""
        if scores.numel() < 2:
            raise ValueError(f"{scores.numel()} monitored samples have no standard error; use at least two")
        values = scores.detach().double()
        return cls(values.mean().item(), values.std().item() / math.sqrt(values.numel()))

    def above(self, other: Measured, *, tolerance: float) -> bool:
        """Whether this lies above the other by more than `tolerance` standard errors of their difference."""
        return self.mean - other.mean > tolerance * math.hypot(self.error, other.error)


@dataclass(frozen=True)
class HackingMonitor:
    """Tells when the trained reward rises while held-out scores fall; a value, `updated` gives the next.

    `history` are the measurements so far: the reward, then each held-out score. The monitored samples have the same
    prompts and seeds at each, so two measurements are closer to each other than their errors say. Samples of other
    seeds are not, and it is for those that a judge has to have fallen: a drift that only these few samples show is
    none.
    """

    names: tuple[str, ...]
    patience: int = 3
    tolerance: float = 2.0
    history: tuple[tuple[Measured, ...], ...] = ()

    def updated(self, reward: Measured, held_out: Sequence[Measured]) -> HackingMonitor:
        """The monitor with one more measurement. Raises ValueError unless there is one score per name."""
        if len(held_out) != len(self.names):
            raise ValueError(f"{len(held_out)} scores for the held-out scorers {', '.join(self.names)}")
        return replace(self, history=(*self.history, (reward, *held_out)))

    def best(self, place: int) -> int:
        """The measurement at which held-out score number `place` was best, the latest of equals."""
        means = [row[1 + place].mean for row in self.history]
        return max(range(len(means)), key=lambda number: (means[number], number))

    def falling(self) -> tuple[str, ...]:
        """Held-out scorers that have been below their best for `patience` measurements, while the reward rose.

        Both count between that best and the last measurement, and only by more than `tolerance` standard errors.
        """
        found, last = [], len(self.history) - 1
        for place, name in enumerate(self.names):
            if last - (since := self.best(place)) < self.patience:
                continue
            then, now = self.history[since], self.history[last]
            fell = then[1 + place].above(now[1 + place], tolerance=self.tolerance)
            if fell and now[0].above(then[0], tolerance=self.tolerance):
                found.append(name)
        return tuple(found)

    def message(self) -> str | None:
        """What to say, or None."""
        names = self.falling()
        if not names:
            return None
        last, told = len(self.history) - 1, []
        for name in names:
            place = self.names.index(name)
            since = self.best(place)
            then, now = self.history[since], self.history[last]
            told.append(
                f"held-out {name} fell from {then[1 + place].mean:.4g} to {now[1 + place].mean:.4g} in {last - since} "
                f"measurements, in which the trained reward rose from {then[0].mean:.4g} to {now[0].mean:.4g}"
            )
        return (
            f"{'; '.join(told)}; both are more than {self.tolerance:g} standard errors: the student learns to please "
            "the scorer; stop at an earlier checkpoint, or raise the weight of what holds it (matching, KL or penalty)"
        )


def held_out_metric(name: str) -> str:
    """The metric of a held-out scorer: held_out_NAME, once for those whose name begins so."""
    return f"held_out_{name.removeprefix('held_out_')}"


class RewardWatch:
    """The watch of a distillation run, with measurements of fixed prompts and seeds every `monitor.every` steps.

    Make it before a checkpoint is loaded: the samples of the start are what the distance is measured from.
    """

    def __init__(self, config: RewardRunConfig, setup: RewardSetup, trainer: Trainer) -> None:
        self.config, self.setup, self.trainer = config, setup, trainer
        self.watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
        names = tuple(scorer.card.name for scorer in setup.held_out)
        if len({held_out_metric(name) for name in names}) < len(names):
            raise ValueError(f"reward.held_out: two of {', '.join(names)} have one metric; leave one out")
        self.hacking = HackingMonitor(names, config.monitor.patience, config.monitor.tolerance)
        self.told_at = -config.monitor.patience
        self.start_latents = self.latents()

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly."""
        rows = [[[score.mean, score.error] for score in row] for row in self.hacking.history]
        return {**self.watch.state(), "hacking": rows, "told_at": self.told_at}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state(state)
        history = tuple(tuple(Measured(*score) for score in row) for row in state["hacking"])
        self.hacking = replace(self.hacking, history=history)
        self.told_at = state["told_at"]

    @property
    def due(self) -> bool:
        return self.trainer.step % self.config.monitor.every == 0

    @torch.no_grad()
    def latents(self) -> Tensor:
        """Samples of the averaged student for the fixed prompts, each with its seeds."""
        setup, monitor = self.setup, self.config.monitor
        prompts = min(monitor.prompts, len(setup.prompts))
        rows = [number // monitor.samples_per_prompt for number in range(prompts * monitor.samples_per_prompt)]
        indices = list(range(len(rows)))

        def noise(stream: str) -> Tensor:
            return sample_noise(GRID_SEED, indices, setup.latent_shape, stream=stream, device=setup.device)

        renoise = [noise(f"monitor_renoise_{step}") for step in range(len(setup.student.times) - 1)]
        role = setup.student_role
        assert role.ema is not None
        with role.ema.applied(role.module):
            return setup.student.sample(noise("monitor"), setup.prompts.rows(rows), renoise)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Reward, held-out scores, diversity and distance of the averaged student; every process measures the same.

        Raises RewardError when a scorer fails, NonFiniteError for samples that are not finite.
        """
        setup, monitor = self.setup, self.config.monitor
        latents = self.latents()
        self.trainer.check_finite("monitored samples", latents)
        pixels, each = setup.teacher.decode(latents), monitor.samples_per_prompt
        prompts = [setup.prompts.prompts[number // each] for number in range(len(latents))]
        parts = self._scored(setup.reward.scorers, pixels, prompts)
        reward = Measured.of(setup.reward.total(setup.reward.normalised(parts)))
        record = {"monitor_reward": reward.mean} | {f"monitor_{name}": value for name, value in parts.means().items()}
        held_out: list[Measured] = []
        if setup.held_out:
            found = self._scored(setup.held_out, pixels, prompts)
            held_out = [Measured.of(row) for row in found.values]
            record |= {held_out_metric(name): score.mean for name, score in zip(found.names, held_out, strict=True)}
        record["monitor_diversity"] = group_distance(pixels, each)
        record["monitor_distance"] = (latents - self.start_latents).square().mean().sqrt().item()
        self.hacking = self.hacking.updated(reward, held_out)
        return record

    def _scored(self, scorers: Sequence[Scorer], pixels: Tensor, prompts: list[str]) -> RewardParts:
        try:
            return score_all(scorers, pixels, prompts, chunk=self.config.reward.chunk)
        except Exception as error:  # Scorers are the user's code, or another process: anything can come.
            told = f"step {self.trainer.step}: the measurement failed ({type(error).__name__}: {error})"
            raise RewardError(told, clean=False) from error

    def start(self) -> None:
        """Measure the student at the start and keep it in the metrics as step 0."""
        record = self.measure()
        if self.trainer.is_main:
            self.trainer.directory.append({"step": self.trainer.step, **record})
            self.trainer.directory.scalars(self.trainer.step, record)

    def say(self) -> None:
        """Say that the reward is being hacked, at most once per `patience` measurements."""
        message, count = self.hacking.message(), len(self.hacking.history)
        if message is not None and count - self.told_at >= self.config.monitor.patience:
            self.told_at = count
            self.trainer.note(f"health: {message}")


def group_distance(pixels: Tensor, each: int) -> float:
    """Mean over prompts of the root mean square difference between two of their `each` samples; 0 for one sample."""
    if each < 2:
        return 0.0
    groups = pixels.flatten(1).view(-1, each, pixels[0].numel()).double()
    # The mean over pairs of |a - b|^2 is twice the unbiased variance.
    return (2 * groups.var(dim=1)).mean(dim=1).sqrt().mean().item()


def describe_run(config: RewardRunConfig, setup: RewardSetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, the scorers, and parameters and memory of each network, as text."""
    settings = yaml.safe_dump(plain_values(config), sort_keys=False).rstrip()
    grid = ", ".join(f"{time:.6g}" for time in setup.student.times)
    frozen = {"teacher": setup.teacher.denoiser}
    if setup.reference is not None:
        frozen["reference"] = setup.reference
    table = memory_table(trainer.memory_report(frozen))
    rewards = ", ".join(
        f"{entry.weight:g} {scorer.card.name}"
        for entry, scorer in zip(config.reward.scorers, setup.reward.scorers, strict=True)
    )
    held_out = ", ".join(scorer.card.name for scorer in setup.held_out) or "none"
    return (
        f"{settings}\n{config.method}: steps at t = {grid} ({setup.student.sampler}); latents {setup.latent_shape}; "
        f"reward {rewards}; held out {held_out}; groups of {config.reward.group_size}; {len(setup.prompts)} prompts; "
        f"{trainer.world_size} process(es) on {trainer.device.type}\n{table}"
    )
