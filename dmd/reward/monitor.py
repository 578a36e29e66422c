"""Measurements of fixed samples along a reward run, and a message when the reward is bought with held-out scores.

Shapes: P prompts, S samples of each; pixels [P S, 3, (T,) H, W] in [0, 1], latents [P S, C, (F,) h, w].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.randomness import sample_noise
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import GRID_SEED, Watch, run_text
from fewstep.dmd.reward.config import MonitorConfig, RewardRunConfig, RewardSettings
from fewstep.dmd.reward.scores import RewardModel
from fewstep.dmd.reward.setup import RewardSetup
from fewstep.evaluation.scorers.failure import RewardError
from fewstep.evaluation.scorers.scorer import Scorer
from fewstep.evaluation.scorers.total import RewardParts, score_all


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


@dataclass(frozen=True, eq=False)
class MonitoredSamples:
    """Samples of the fixed prompts and seeds: latents and pixels, see above."""

    latents: Tensor
    pixels: Tensor


class RewardMonitor:
    """Reward, held-out scores, diversity, and distance from the start, of samples with fixed prompts and seeds.

    Args:
        config: how often, and when to speak.
        reward: the trained reward.
        held_out: scorers that are only watched.
        trainer: the run.
        start: the samples that the distance is measured from, in parts that may have different sizes.

    Raises:
        ValueError: two held-out scorers have one metric.
    """

    def __init__(
        self,
        config: MonitorConfig,
        reward: RewardModel,
        held_out: Sequence[Scorer],
        trainer: Trainer,
        start: Sequence[MonitoredSamples],
    ) -> None:
        self.config, self.reward, self.held_out, self.trainer = config, reward, tuple(held_out), trainer
        names = tuple(scorer.card.name for scorer in held_out)
        if len({held_out_metric(name) for name in names}) < len(names):
            raise ValueError(f"reward.held_out: two of {', '.join(names)} have one metric; leave one out")
        self.hacking = HackingMonitor(names, config.patience, config.tolerance)
        self.told_at = -config.patience
        self.start_latents = torch.cat([part.latents for part in start])

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly."""
        rows = [[[score.mean, score.error] for score in row] for row in self.hacking.history]
        return {"hacking": rows, "told_at": self.told_at}

    def load_state(self, state: Mapping[str, Any]) -> None:
        history = tuple(tuple(Measured(*score) for score in row) for row in state["hacking"])
        self.hacking = replace(self.hacking, history=history)
        self.told_at = state["told_at"]

    @property
    def due(self) -> bool:
        return self.trainer.step % self.config.every == 0

    @torch.no_grad()
    def measure(self, samples: Sequence[MonitoredSamples], prompts: Sequence[str]) -> dict[str, float]:
        """The metrics of all parts together; each part has the P prompts, S samples of one side by side.

        Raises RewardError when a scorer fails, NonFiniteError for samples that are not finite.
        """
        latents = torch.cat([part.latents for part in samples])
        self.trainer.check_finite("monitored samples", latents)
        asked = [prompt for prompt in prompts for _ in range(self.config.samples_per_prompt)]
        parts = self._scored(self.reward.scorers, samples, asked)
        reward = Measured.of(self.reward.total(self.reward.normalised(parts)))
        record = {"monitor_reward": reward.mean} | {f"monitor_{name}": value for name, value in parts.means().items()}
        held_out: list[Measured] = []
        if self.held_out:
            found = self._scored(self.held_out, samples, asked)
            held_out = [Measured.of(row) for row in found.values]
            record |= {held_out_metric(name): score.mean for name, score in zip(found.names, held_out, strict=True)}
        distances = [group_distance(part.pixels, self.config.samples_per_prompt) for part in samples]
        record["monitor_diversity"] = sum(distances) / len(distances)
        record["monitor_distance"] = (latents - self.start_latents).square().mean().sqrt().item()
        self.hacking = self.hacking.updated(reward, held_out)
        return record

    def _scored(
        self, scorers: Sequence[Scorer], samples: Sequence[MonitoredSamples], prompts: list[str]
    ) -> RewardParts:
        """All parts, one after the other."""
        chunk = self.reward.settings.chunk
        try:
            parts = [score_all(scorers, part.pixels, prompts, chunk=chunk) for part in samples]
        except Exception as error:  # Scorers are the user's code, or another process: anything can come.
            told = f"step {self.trainer.step}: the measurement failed ({type(error).__name__}: {error})"
            raise RewardError(told, clean=False) from error
        return RewardParts(parts[0].names, torch.cat([part.values for part in parts], dim=1))

    def keep_start(self, record: Mapping[str, float]) -> None:
        """Keep the measurement of the student at the start in the metrics, as step 0."""
        if self.trainer.is_main:
            self.trainer.directory.append({"step": self.trainer.step, **record})
            self.trainer.directory.scalars(self.trainer.step, record)

    def say(self) -> None:
        """Say that the reward is being hacked, at most once per `patience` measurements."""
        message, count = self.hacking.message(), len(self.hacking.history)
        if message is not None and count - self.told_at >= self.config.patience:
            self.told_at = count
            self.trainer.note(f"health: {message}")


def group_distance(pixels: Tensor, each: int) -> float:
    """Mean over prompts of the root mean square difference between two of their `each` samples; 0 for one sample."""
    if each < 2:
        return 0.0
    groups = pixels.flatten(1).view(-1, each, pixels[0].numel()).double()
    # The mean over pairs of |a - b|^2 is twice the unbiased variance.
    return (2 * groups.var(dim=1)).mean(dim=1).sqrt().mean().item()


class RewardWatch:
    """The watch of a distillation run, with measurements of fixed prompts and seeds every `monitor.every` steps.

    Make it before a checkpoint is loaded: the samples of the start are what the distance is measured from.
    """

    def __init__(self, config: RewardRunConfig, setup: RewardSetup, trainer: Trainer) -> None:
        self.config, self.setup = config, setup
        self.watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
        self.monitor = RewardMonitor(config.monitor, setup.reward, setup.held_out, trainer, self.samples())

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly."""
        return {**self.watch.state(), **self.monitor.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state(state)
        self.monitor.load_state(state)

    def begin(self) -> None:
        """The samples and the measurement of a run's start."""
        self.save_samples()
        self.monitor.keep_start(self.measure_now())

    def measure(self) -> Mapping[str, float]:
        """A measurement where one is due."""
        return self.measure_now() if self.monitor.due else {}

    def look_at(self, means: Mapping[str, float] | None) -> None:
        """Say what is unhealthy, in the run and in its rewards."""
        self.watch.look_at(means)
        if self.monitor.due:
            self.monitor.say()

    def save_samples(self) -> None:
        """Write the sample grid."""
        self.watch.save_samples()

    @torch.no_grad()
    def samples(self) -> list[MonitoredSamples]:
        """Samples of the averaged student for the fixed prompts, each with its seeds; one part."""
        setup, monitor = self.setup, self.config.monitor
        rows = [number // monitor.samples_per_prompt for number in range(self.prompts * monitor.samples_per_prompt)]
        indices = list(range(len(rows)))

        def noise(stream: str) -> Tensor:
            return sample_noise(GRID_SEED, indices, setup.latent_shape, stream=stream, device=setup.device)

        renoise = [noise(f"monitor_renoise_{step}") for step in range(len(setup.student.times) - 1)]
        role = setup.student_role
        assert role.ema is not None
        with role.ema.applied(role.module):
            latents = setup.student.sample(noise("monitor"), setup.prompts.rows(rows), renoise)
        return [MonitoredSamples(latents, setup.teacher.decode(latents))]

    @property
    def prompts(self) -> int:
        """How many are watched, the first of the file."""
        return min(self.config.monitor.prompts, len(self.setup.prompts))

    def measure_now(self) -> dict[str, float]:
        """Measure the averaged student; every process measures the same. Raises as `RewardMonitor.measure`."""
        return self.monitor.measure(self.samples(), self.setup.prompts.prompts[: self.prompts])


def describe_run(config: RewardRunConfig, setup: RewardSetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, the scorers, and parameters and memory of each network, as text."""
    frozen: dict[str, nn.Module] = {"teacher": setup.teacher.denoiser}
    if setup.reference is not None:
        frozen["reference"] = setup.reference
    told = f"{config.method}: steps at t = {setup.student.grid_text} ({setup.student.sampler}); "
    told += f"latents {setup.latent_shape}; {reward_text(config.reward, setup.reward, setup.held_out)}; "
    return run_text(config, trainer, f"{told}{len(setup.prompts)} prompts", frozen=frozen)


def reward_text(settings: RewardSettings, reward: RewardModel, held_out: Sequence[Scorer]) -> str:
    """Which scorers are followed and which are held out."""
    pairs = zip(settings.scorers, reward.scorers, strict=True)
    followed = ", ".join(f"{entry.weight:g} {scorer.card.name}" for entry, scorer in pairs)
    others = ", ".join(scorer.card.name for scorer in held_out) or "none"
    return f"reward {followed}; held out {others}; groups of {settings.group_size}"
