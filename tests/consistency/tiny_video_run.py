"""A complete consistency run of a tiny random Wan: its settings and its parts. Inputs are those of causal students."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.consistency.config import ConsistencyConfig, ConsistencyLossConfig
from fewstep.consistency.mcm.config import McmConfig
from fewstep.core.config import RunConfig
from fewstep.core.settings import DataConfig, StudentConfig, TeacherConfig
from tests.causal_video.tiny_causal_run import VideoInputs
from tests.consistency.tiny_consistency_run import FAKE_SCORE, OPTIMIZER
from tests.tiny_videos import VIDEO_FRAMES, VIDEO_SIDE

GRID: Any = {"objective": "dcm", "grid_steps": 8, "grid_shift": 3.0}
PARTITION: Any = {"objective": "anyflow", "tangent": "central", "pairs": "partition"}
MCM = McmConfig(optimizer=OPTIMIZER, head_width=8)
# Name of a case: its method, its loss, and the section mcm.
VIDEO_CASES: dict[str, tuple[str, ConsistencyLossConfig, McmConfig | None]] = {
    "scm": ("scm", ConsistencyLossConfig(coordinates="rf", check_tangent=False, time_std=0.8), None),
    "dcm": ("dcm", ConsistencyLossConfig(**GRID), None),
    "rcm": ("rcm", ConsistencyLossConfig(**GRID, dmd_weight=0.5), None),
    "meanflow": ("meanflow", ConsistencyLossConfig(objective="meanflow", check_tangent=False), None),
    "anyflow": ("anyflow", ConsistencyLossConfig(**PARTITION), None),
    "anyflow_dmd": ("anyflow", ConsistencyLossConfig(**PARTITION, dmd_weight=0.5, rollout_steps=(1, 2, 4)), None),
    "mcm": ("mcm", ConsistencyLossConfig(**GRID), MCM),
    "mcm_difference": ("mcm", ConsistencyLossConfig(**GRID), dataclasses.replace(MCM, motion="difference", frames=3)),
    "mcm_alone": ("mcm", ConsistencyLossConfig(**GRID), dataclasses.replace(MCM, adversarial_weight=0.0)),
}
SECOND_TIMES = {"meanflow": "sum", "anyflow": "gate"}


def tiny_video(
    inputs: VideoInputs, directory: Path, name: str, changes: Mapping[str, Any] | None = None
) -> ConsistencyConfig:
    """Settings of a run of one case; `changes` replaces fields of `run`."""
    method, loss, mcm = VIDEO_CASES[name]
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
        data=DataConfig(
            prompts=str(inputs.prompts),
            latents=str(inputs.latents),
            height=VIDEO_SIDE,
            width=VIDEO_SIDE,
            frames=VIDEO_FRAMES,
            sample_count=2,
        ),
        run=dataclasses.replace(run, **(changes or {})),
        student=StudentConfig(
            optimizer=OPTIMIZER,
            ema_decay=0.8,
            steps=2,
            shift=3.0,
            sampler="flow_map" if method in SECOND_TIMES else "sde",
        ),
        second_time=SECOND_TIMES.get(method, "none"),  # pyright: ignore[reportArgumentType]
        loss=loss,
        fake_score=FAKE_SCORE if loss.dmd_weight > 0 else None,
        mcm=mcm,
    )
