"""A complete consistency run of a tiny random Stable Diffusion 3: its settings and its parts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.consistency.config import ConsistencyConfig, ConsistencyLossConfig
from fewstep.consistency.setup import ConsistencyData, ConsistencySetup, build_setup
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import DataConfig, FakeScoreConfig, StudentConfig, TeacherConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from tests.dmd.tiny_run import TinyInputs

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
FAKE_SCORE = FakeScoreConfig(optimizer=OPTIMIZER, updates_per_student_update=2)
FROM_DATA: Any = {"velocity": "data", "check_tangent": False, "time_std": 0.8}
# Name of a case: its method and its loss.
OBJECTIVES: dict[str, tuple[str, ConsistencyLossConfig]] = {
    "scm": ("scm", ConsistencyLossConfig(check_tangent=False)),
    "scm_rf": ("scm", ConsistencyLossConfig(coordinates="rf", tangent_warmup=4, check_tangent=False)),
    "scm_weight": ("scm", ConsistencyLossConfig(learned_weight=True, check_tangent=False)),
    "scm_central": ("scm", ConsistencyLossConfig(coordinates="rf", tangent="central", check_tangent=False)),
    "dcm": ("dcm", ConsistencyLossConfig(objective="dcm", grid_steps=8)),
    "ect": ("ect", ConsistencyLossConfig(objective="ect", ect_stage_steps=1)),
    "rcm": ("rcm", ConsistencyLossConfig(dmd_weight=0.5, dmd_start=1, check_tangent=False)),
    "meanflow": ("meanflow", ConsistencyLossConfig(objective="meanflow", check_tangent=False)),
    "meanflow_data": ("meanflow", ConsistencyLossConfig(**FROM_DATA, objective="meanflow", kappa=0.5)),
    "imf": ("imf", ConsistencyLossConfig(**FROM_DATA, objective="imf")),
    "alphaflow": ("alphaflow", ConsistencyLossConfig(objective="alphaflow", check_tangent=False)),
    "dmf": ("dmf", ConsistencyLossConfig(objective="dmf", check_tangent=False)),
    "anyflow": ("anyflow", ConsistencyLossConfig(objective="anyflow", tangent="central", pairs="partition")),
    "anyflow_data": ("anyflow", ConsistencyLossConfig(**FROM_DATA, objective="anyflow", pairs="partition")),
    "anyflow_dmd": (
        "anyflow",
        ConsistencyLossConfig(
            objective="anyflow",
            tangent="central",
            pairs="partition",
            dmd_weight=0.5,
            dmd_start=1,
            rollout_steps=(1, 2, 4),
        ),
    ),
}
SECOND_TIMES = {"meanflow": "sum", "imf": "gate", "alphaflow": "sum", "dmf": "decoupled", "anyflow": "gate"}


def tiny_consistency(
    inputs: TinyInputs, directory: Path, name: str, changes: Mapping[str, Any] | None = None
) -> ConsistencyConfig:
    """Settings of a run of one case; `changes` replaces fields of `run`."""
    method, loss = OBJECTIVES[name]
    run = RunConfig(
        directory=str(directory),
        seed=5,
        steps=4,
        batch_size=4,
        checkpoint_every=2,
        keep_checkpoints=20,
        sample_every=1000,
        log_every=1,
    )
    return ConsistencyConfig(
        method=method,  # pyright: ignore[reportArgumentType]
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=2.0),
        data=DataConfig(prompts=str(inputs.prompts), latents=str(inputs.latents), sample_count=2),
        run=dataclasses.replace(run, **(changes or {})),
        student=StudentConfig(
            optimizer=OPTIMIZER, ema_decay=0.8, steps=2, sampler="flow_map" if method in SECOND_TIMES else "sde"
        ),
        second_time=SECOND_TIMES.get(method, "none"),  # pyright: ignore[reportArgumentType]
        loss=loss,
        fake_score=FAKE_SCORE if loss.dmd_weight > 0 else None,
    )


def start_consistency(config: ConsistencyConfig) -> tuple[ConsistencySetup, Trainer]:
    """The parts of a run, ready for `train_step`. Close the trainer at the end."""
    data = ConsistencyData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    return build_setup(config, data, trainer), trainer
