"""A complete consistency run of a tiny random Stable Diffusion 3: its settings and its parts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.consistency.config import ConsistencyConfig, ConsistencyDataConfig, ConsistencyMatchingConfig
from fewstep.consistency.sections import (
    AlphaflowConfig,
    AnyflowConfig,
    DcmConfig,
    DmfConfig,
    EctConfig,
    ImfConfig,
    MeanflowConfig,
    ScmConfig,
)
from fewstep.consistency.setup import ConsistencyData, ConsistencySetup, build_setup
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import FakeScoreConfig, GridStudentConfig, TeacherConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from tests.dmd.tiny_run import TinyInputs

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
FAKE_SCORE = FakeScoreConfig(optimizer=OPTIMIZER, ratio=1)
FROM_DATA: Any = {"velocity": "data", "check_tangent": False}
MATCHED: Any = {"matching": ConsistencyMatchingConfig(weight=0.5, start=1), "fake_score": FAKE_SCORE}
PARTITION: Any = {"tangent": "central", "pairs": "partition"}
# Name of a case: the sections that are its method.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "scm": {"scm": ScmConfig(check_tangent=False)},
    "scm_rf": {"scm": ScmConfig(coordinates="rf", tangent_warmup=4, check_tangent=False)},
    "scm_weight": {"scm": ScmConfig(learned_weight=True, check_tangent=False)},
    "scm_central": {"scm": ScmConfig(coordinates="rf", tangent="central")},
    "dcm": {"dcm": DcmConfig(grid_steps=8)},
    "ect": {"ect": EctConfig(stage_steps=1)},
    "rcm": {"scm": ScmConfig(check_tangent=False), **MATCHED},
    "meanflow": {"meanflow": MeanflowConfig(check_tangent=False)},
    "meanflow_data": {"meanflow": MeanflowConfig(**FROM_DATA, time_std=0.8, kappa=0.5)},
    "imf": {"imf": ImfConfig(**FROM_DATA, time_std=0.8, second_time="gate")},
    "alphaflow": {"alphaflow": AlphaflowConfig(check_tangent=False)},
    "dmf": {"dmf": DmfConfig(check_tangent=False)},
    "anyflow": {"anyflow": AnyflowConfig(**PARTITION)},
    "anyflow_data": {"anyflow": AnyflowConfig(**FROM_DATA, pairs="partition")},
    "anyflow_dmd": {"anyflow": AnyflowConfig(**PARTITION, rollout_steps=(1, 2, 4)), **MATCHED},
}


def tiny_consistency(
    inputs: TinyInputs, directory: Path, name: str, changes: Mapping[str, Any] | None = None
) -> ConsistencyConfig:
    """Settings of a run of one case; `changes` replaces fields of `run`."""
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
        # ECT has no teacher that could be guided.
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=1.0 if name == "ect" else 2.0),
        data=ConsistencyDataConfig(prompts=str(inputs.prompts), latents=str(inputs.latents), sample_count=2),
        run=dataclasses.replace(run, **(changes or {})),
        student=GridStudentConfig(optimizer=OPTIMIZER, ema_decay=0.8, steps=2),
        **OBJECTIVES[name],
    )


def start_consistency(config: ConsistencyConfig) -> tuple[ConsistencySetup, Trainer]:
    """The parts of a run, ready for `train_step`. Close the trainer at the end."""
    data = ConsistencyData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    return build_setup(config, data, trainer), trainer
