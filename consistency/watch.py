"""What a consistency run says about itself at the start."""

from __future__ import annotations

import yaml

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.setup import ConsistencySetup
from fewstep.core.config import plain_values
from fewstep.core.roles import memory_table
from fewstep.core.trainer import Trainer


def describe_run(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, and parameters and memory of each network, as text."""
    settings = yaml.safe_dump(plain_values(config), sort_keys=False).rstrip()
    grid = ", ".join(f"{time:.6g}" for time in setup.student.times)
    table = memory_table(trainer.memory_report({"teacher": setup.teacher.denoiser}))
    return (
        f"{settings}\nsteps at t = {grid}; latents {setup.latent_shape}; {len(setup.real.dataset.prompts)} data, "
        f"{len(setup.prompts)} prompts; {trainer.world_size} process(es) on {trainer.device.type}\n{table}"
    )
