"""What is seen of a reward run beside its losses: held-out scorers, diversity, distance from the start, and in words.

Shapes: P prompts, S samples of each; pixels [P S, 3, H, W] in [0, 1], latents [P S, C, h, w].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
class HackingMonitor:
    """Tells when the trained reward rises while held-out scores fall; a value, `updated` gives the next.

    `history` are the measurements so far: the reward, then each held-out score, higher is better.
    """

    names: tuple[str, ...]
    patience: int = 3
    history: tuple[tuple[float, ...], ...] = ()

    def updated(self, reward: float, held_out: Sequence[float]) -> HackingMonitor:
        """The monitor with one more measurement. Raises ValueError unless there is one score per name."""
        if len(held_out) != len(self.names):
            raise ValueError(f"{len(held_out)} scores for the held-out scorers {', '.join(self.names)}")
        return HackingMonitor(self.names, self.patience, (*self.history, (reward, *held_out)))

    def falling(self) -> tuple[str, ...]:
        """Held-out scorers whose last `patience` measurements each lie below the one before, while the reward rose.

        The reward counts as rising when the last measurement lies above the one `patience` earlier.
        """
        recent = self.history[-self.patience - 1 :]
        if len(recent) <= self.patience or recent[-1][0] <= recent[0][0]:
            return ()
        pairs = list(itertools.pairwise(recent))
        return tuple(
            name
            for place, name in enumerate(self.names, start=1)
            if all(later[place] < earlier[place] for earlier, later in pairs)
        )

    def message(self) -> str | None:
        """What to say, or None."""
        names = self.falling()
        if not names:
            return None
        first, last = self.history[-self.patience - 1], self.history[-1]
        seen = ", ".join(
            f"{name} fell from {first[1 + self.names.index(name)]:.4g} to {last[1 + self.names.index(name)]:.4g}"
            for name in names
        )
        return (
            f"the trained reward rose from {first[0]:.4g} to {last[0]:.4g} while {seen} in {self.patience} "
            "measurements in a row: the student learns to please the scorer; stop at an earlier checkpoint, or raise "
            "objective.matching_weight or the kl_weight"
        )


class RewardWatch:
    """The watch of a distillation run, with measurements of fixed prompts and seeds every `monitor.every` steps.

    Make it before a checkpoint is loaded: the samples of the start are what the distance is measured from.
    """

    def __init__(self, config: RewardRunConfig, setup: RewardSetup, trainer: Trainer) -> None:
        self.config, self.setup, self.trainer = config, setup, trainer
        self.watch = Watch(setup, trainer, sample_count=config.data.sample_count, guidance=config.teacher.guidance)
        names = tuple(scorer.card.name for scorer in setup.held_out)
        self.hacking = HackingMonitor(names, config.monitor.patience)
        self.told_at = -config.monitor.patience
        self.start_latents = self.latents()

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly."""
        return {**self.watch.state(), "hacking": [list(row) for row in self.hacking.history], "told_at": self.told_at}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state(state)
        history = tuple(tuple(row) for row in state["hacking"])
        self.hacking = HackingMonitor(self.hacking.names, self.hacking.patience, history)
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
        reward = setup.reward.total(setup.reward.normalised(parts)).mean().item()
        record = {"monitor_reward": reward} | {f"monitor_{name}": value for name, value in parts.means().items()}
        held_out: dict[str, float] = {}
        if setup.held_out:
            held_out = self._scored(setup.held_out, pixels, prompts).means()
        record |= {f"held_out_{name}": value for name, value in held_out.items()}
        record["monitor_diversity"] = group_distance(pixels, each)
        record["monitor_distance"] = (latents - self.start_latents).square().mean().sqrt().item()
        self.hacking = self.hacking.updated(reward, list(held_out.values()))
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
