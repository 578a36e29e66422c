"""What is seen of a reward run on streams beside its losses: contact sheets, windows of fixed prompts and seeds.

Shapes: P prompts, S candidates of each; pixels [P S, 3, T, H, W] in [0, 1], latents [P S, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping
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
from fewstep.dmd.reward_monitor import MonitoredSamples, RewardMonitor


class CausalRewardWatch:
    """The watch of a causal run, with measurements every `monitor.every` steps on the first and the last window.

    Make it before a checkpoint is loaded: the windows of the start are what the distance is measured from.
    """

    def __init__(self, config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer) -> None:
        self.config, self.setup = config, setup
        self.watch = VideoWatch(config.as_stage(), setup.causal, trainer)
        self.monitor = RewardMonitor(config.monitor, setup.reward, setup.held_out, trainer, self.samples())

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly."""
        return {**self.watch.state(), **self.monitor.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state(state)
        self.monitor.load_state(state)

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

    def samples(self) -> list[MonitoredSamples]:
        """The windows as parts: they may have different numbers of frames."""
        return [MonitoredSamples(window.latents, window.pixels) for window in self.windows()]

    def measure(self) -> dict[str, float]:
        """Measure the averaged student; every process measures the same. Raises as `RewardMonitor.measure`."""
        return self.monitor.measure(self.samples(), self.prompts)


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
