"""What is seen of a reward run on streams beside its losses: contact sheets, windows of fixed prompts and seeds.

Shapes: P prompts, S candidates of each; pixels [P S, 3, T, H, W] in [0, 1], latents [P S, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import nn

from fewstep.causal_video.denoise import ChunkNoise
from fewstep.causal_video.reward_config import CausalRewardConfig
from fewstep.causal_video.reward_setup import CausalRewardSetup
from fewstep.causal_video.reward_turns import Window, WindowPlan, draw_window
from fewstep.causal_video.watch import VideoWatch
from fewstep.core.config import plain_values
from fewstep.core.roles import memory_table
from fewstep.core.trainer import Trainer
from fewstep.core.watch import GRID_SEED
from fewstep.dmd.reward_turns_scores import RewardError
from fewstep.dmd.reward_watch import HackingMonitor, Measured, group_distance, held_out_metric
from fewstep.evaluation.reward_sum import RewardParts, score_all
from fewstep.evaluation.scorer import Scorer


class CausalRewardWatch:
    """The watch of a causal run, with measurements every `monitor.every` steps on the first and the last window.

    Make it before a checkpoint is loaded: the windows of the start are what the distance is measured from.
    """

    def __init__(self, config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer) -> None:
        self.config, self.setup, self.trainer = config, setup, trainer
        self.watch = VideoWatch(config.as_stage(), setup.causal, trainer)
        names = tuple(scorer.card.name for scorer in setup.held_out)
        if len({held_out_metric(name) for name in names}) < len(names):
            raise ValueError(f"reward.held_out: two of {', '.join(names)} have one metric; leave one out")
        self.hacking = HackingMonitor(names, config.monitor.patience, config.monitor.tolerance)
        self.told_at = -config.monitor.patience
        self.start_latents = torch.cat([window.latents for window in self.windows()])

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

    @property
    def prompts(self) -> list[str]:
        """The P prompts that are watched."""
        return list(self.setup.causal.prompts.prompts[: self.config.monitor.prompts])

    @torch.no_grad()
    def windows(self) -> list[Window]:
        """The first and the last window of the averaged student's streams, one where they are the same."""
        causal, monitor, chunks = self.setup.causal, self.config.monitor, self.config.window.chunks
        rows, each = list(range(len(self.prompts))), monitor.samples_per_prompt
        channels, _, height, width = causal.latent_shape
        frame, role = (channels, height, width), causal.student_role
        tokens = causal.prompts.rows(rows).tokens
        assert role.ema is not None
        with role.ema.applied(role.module):
            return [
                draw_window(
                    causal.student,
                    self.setup.vae,
                    tokens,
                    causal.settings,
                    WindowPlan(start, chunks),
                    before=ChunkNoise(GRID_SEED, tuple(rows), frame, stream="monitor before"),
                    inside=ChunkNoise(GRID_SEED, tuple(range(len(rows) * each)), frame, stream="monitor"),
                )
                for start in sorted({0, self.config.longest_chunks - chunks})
            ]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Reward, held-out scores, diversity and distance of the averaged student; every process measures the same.

        Raises RewardError when a scorer fails, NonFiniteError for samples that are not finite.
        """
        setup, each, found = self.setup, self.config.monitor.samples_per_prompt, self.windows()
        latents = torch.cat([window.latents for window in found])
        self.trainer.check_finite("monitored samples", latents)
        prompts = [prompt for prompt in self.prompts for _ in range(each)]
        parts = self._scored(setup.reward.scorers, found, prompts)
        reward = Measured.of(setup.reward.total(setup.reward.normalised(parts)))
        record = {"monitor_reward": reward.mean} | {f"monitor_{name}": value for name, value in parts.means().items()}
        held_out: list[Measured] = []
        if setup.held_out:
            held = self._scored(setup.held_out, found, prompts)
            held_out = [Measured.of(row) for row in held.values]
            record |= {held_out_metric(name): score.mean for name, score in zip(held.names, held_out, strict=True)}
        distances = [group_distance(window.pixels, each) for window in found]
        record["monitor_diversity"] = sum(distances) / len(distances)
        record["monitor_distance"] = (latents - self.start_latents).square().mean().sqrt().item()
        self.hacking = self.hacking.updated(reward, held_out)
        return record

    def _scored(self, scorers: Sequence[Scorer], windows: Sequence[Window], prompts: list[str]) -> RewardParts:
        """All windows, one after the other: they may have different numbers of frames."""
        try:
            parts = [score_all(scorers, window.pixels, prompts, chunk=self.config.reward.chunk) for window in windows]
        except Exception as error:  # Scorers are the user's code, or another process: anything can come.
            told = f"step {self.trainer.step}: the measurement failed ({type(error).__name__}: {error})"
            raise RewardError(told, clean=False) from error
        return RewardParts(parts[0].names, torch.cat([part.values for part in parts], dim=1))

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


def describe_run(config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer) -> str:
    """The resolved settings, the times of each chunk, the scorers, and parameters and memory of networks, as text."""
    causal = setup.causal
    settings = yaml.safe_dump(plain_values(config), sort_keys=False).rstrip()
    schedule = "; ".join(", ".join(f"{t:.6g}" for t in times) for times in causal.settings.schedule.times)
    held: dict[str, nn.Module] = {"teacher": causal.teacher.denoiser}
    table = memory_table(trainer.memory_report(held))
    pairs = zip(config.reward.scorers, setup.reward.scorers, strict=True)
    rewards = ", ".join(f"{entry.weight:g} {scorer.card.name}" for entry, scorer in pairs)
    held_out = ", ".join(scorer.card.name for scorer in setup.held_out) or "none"
    return (
        f"{settings}\n{config.method}: windows of {config.window.chunks} chunks in streams of up to "
        f"{config.longest_chunks}; chunks of {list(causal.settings.layout.lengths)} latent frames at t = {schedule} "
        f"(the last one repeats); reward {rewards}; held out {held_out}; groups of {config.reward.group_size}; "
        f"{len(causal.prompts)} prompts; {trainer.world_size} process(es) on {trainer.device.type}\n{table}"
    )
