"""What is seen of a reward run on pictures beside its losses: sample grids, fixed prompts and seeds, and in words."""

from __future__ import annotations

from collections.abc import Mapping
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
from fewstep.dmd.reward_monitor import MonitoredSamples, RewardMonitor
from fewstep.dmd.reward_setup import RewardSetup


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

    def measure(self) -> dict[str, float]:
        """Measure the averaged student; every process measures the same. Raises as `RewardMonitor.measure`."""
        return self.monitor.measure(self.samples(), self.setup.prompts.prompts[: self.prompts])


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
