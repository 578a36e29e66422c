"""What a DMD run says about itself at the start."""

from __future__ import annotations

import yaml

from fewstep.core.config import plain_values
from fewstep.core.roles import memory_table
from fewstep.core.trainer import Trainer
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.setup import DmdSetup


def describe_run(config: DmdConfig, setup: DmdSetup, trainer: Trainer) -> str:
    """The resolved settings, the step grid, and parameters and memory of each network, as text."""
    settings = yaml.safe_dump(plain_values(config), sort_keys=False).rstrip()
    grid = ", ".join(f"{time:.6g}" for time in setup.student.times)
    table = memory_table(trainer.memory_report({"teacher": setup.teacher.denoiser}))
    ratio = config.fake_score.updates_per_student_update
    return (
        f"{settings}\nsteps at t = {grid} ({setup.student.sampler}); latents {setup.latent_shape}; "
        f"{ratio} fake-score updates per student update; {len(setup.prompts)} prompts; "
        f"{trainer.world_size} process(es) on {trainer.device.type}\n{table}"
    )
