"""What is seen of a reward run on streams beside its losses: contact sheets, windows of fixed prompts and seeds.

Shapes: P prompts, S candidates of each; pixels [P S, 3, T, H, W] in [0, 1], latents [P S, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewstep.causal_video.denoise import ChunkNoise
from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.reward.setup import CausalRewardSetup
from fewstep.causal_video.reward.state import PenaltyState
from fewstep.causal_video.reward.window import Window, WindowPlan, draw_window
from fewstep.causal_video.stages.watch import VideoWatch
from fewstep.core.training.trainer import Trainer
from fewstep.core.training.watch import GRID_SEED, run_text
from fewstep.dmd.reward.monitor import MonitoredSamples, RewardMonitor, reward_text


class CausalRewardWatch:
    """The watch of a causal run, with measurements every `monitor.every` steps on the first and the last window.

    `penalty` is what the selective penalty carries from step to step; it goes into checkpoints with the rest.

    Make it before a checkpoint is loaded: the windows of the start are what the distance is measured from.
    """

    def __init__(self, config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer) -> None:
        self.config, self.setup = config, setup
        samples, guidance = config.data.sample_count, config.teacher.guidance
        self.watch = VideoWatch(setup.causal, trainer, sample_count=samples, guidance=guidance, is_flow=False)
        self.monitor = RewardMonitor(config.monitor, setup.reward, setup.held_out, trainer, self.samples())
        self.penalty = PenaltyState.start(config)

    def state(self) -> dict[str, Any]:
        """JSON data from which `load_state` goes on exactly."""
        return {"watch": {**self.watch.state(), **self.monitor.state()}, "penalty": self.penalty.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state(state["watch"])
        self.monitor.load_state(state["watch"])
        self.penalty = PenaltyState.loaded(state["penalty"])

    def begin(self) -> None:
        """The sheet and the measurement of a run's start."""
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
        """Write the contact sheet."""
        self.watch.save_samples()

    @property
    def prompts(self) -> list[str]:
        """The P prompts that are watched."""
        return list(self.setup.causal.prompts.prompts[: self.config.monitor.prompts])

    @torch.no_grad()
    def windows(self) -> list[Window]:
        """The first and the last window of the averaged student's streams, one where they are the same."""
        causal, monitor, chunks = self.setup.causal, self.config.monitor, self.config.section.chunks
        rows, each = list(range(len(self.prompts))), monitor.samples_per_prompt
        channels, _, height, width = causal.latent_shape
        frame, role = (channels, height, width), causal.student_role
        tokens = causal.prompts.rows(rows).text
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

    def measure_now(self) -> dict[str, float]:
        """Measure the averaged student; every process measures the same. Raises as `RewardMonitor.measure`."""
        return self.monitor.measure(self.samples(), self.prompts)


def describe_run(config: CausalRewardConfig, setup: CausalRewardSetup, trainer: Trainer) -> str:
    """The resolved settings, the times of each chunk, the scorers, and parameters and memory of networks, as text."""
    causal, frozen = setup.causal, {"teacher": setup.causal.teacher.denoiser}
    text = (
        f"{config.method}: windows of {config.section.chunks} chunks in streams of up to {config.longest_chunks}; "
        f"{causal.settings.text}; {reward_text(config.reward, setup.reward, setup.held_out)}; "
        f"{len(causal.prompts)} prompts"
    )
    return run_text(config, trainer, text, frozen=frozen)
