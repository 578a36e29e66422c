"""A complete consistency run of a tiny random Wan: its inputs on disk and its settings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.consistency.config import ConsistencyConfig, ConsistencyDataConfig, ConsistencyMatchingConfig
from fewstep.consistency.mcm.config import McmConfig, McmDiscriminatorConfig
from fewstep.consistency.sections import AnyflowConfig, DcmConfig, MeanflowConfig, ScmConfig
from fewstep.core.config import RunConfig
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import GridStudentConfig, TeacherConfig
from tests.consistency.tiny_consistency_run import FAKE_SCORE, OPTIMIZER, PARTITION
from tests.tiny_pipelines import save_pipeline
from tests.tiny_videos import VIDEO_FRAMES, VIDEO_LATENTS, VIDEO_SIDE, build_video_pipeline

PROMPTS = ("a red cat", "two dogs", "blue 7", "house 42")
GRID: Any = {"grid_steps": 8, "grid_shift": 3.0}
MATCHED: Any = {"matching": ConsistencyMatchingConfig(weight=0.5), "fake_score": FAKE_SCORE}
HEADS = McmDiscriminatorConfig(optimizer=OPTIMIZER, head_width=8)
MCM = McmConfig(**GRID, discriminator=HEADS)
# Name of a case: the sections that are its method.
VIDEO_CASES: dict[str, dict[str, Any]] = {
    "scm": {"scm": ScmConfig(coordinates="rf", check_tangent=False, time_std=0.8)},
    "dcm": {"dcm": DcmConfig(**GRID)},
    "rcm": {"dcm": DcmConfig(**GRID), **MATCHED},
    "meanflow": {"meanflow": MeanflowConfig(check_tangent=False)},
    "anyflow": {"anyflow": AnyflowConfig(**PARTITION)},
    "anyflow_dmd": {"anyflow": AnyflowConfig(**PARTITION, rollout_steps=(1, 2, 4)), **MATCHED},
    "mcm": {"mcm": MCM},
    "mcm_difference": {
        "mcm": dataclasses.replace(MCM, motion="difference", discriminator=dataclasses.replace(HEADS, frames=3))
    },
    "mcm_alone": {"mcm": dataclasses.replace(MCM, discriminator=None)},
}


@dataclass(frozen=True)
class VideoInputs:
    """Paths of what a run reads."""

    teacher: Path
    prompts: Path
    latents: Path


def write_inputs(folder: Path) -> VideoInputs:
    """A random teacher, four prompts, and five videos with captions."""
    teacher = save_pipeline(build_video_pipeline(text_tokens=8), folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    latents = 0.2 + 0.8 * sample_noise(9, range(5), VIDEO_LATENTS, stream="data")
    LatentDataset(latents, tuple(f"video {number}" for number in range(5))).save(folder / "latents")
    return VideoInputs(teacher, folder / "prompts.txt", folder / "latents")


def tiny_video(
    inputs: VideoInputs, directory: Path, name: str, changes: Mapping[str, Any] | None = None
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
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=2.0),
        data=ConsistencyDataConfig(
            prompts=str(inputs.prompts),
            latents=str(inputs.latents),
            height=VIDEO_SIDE,
            width=VIDEO_SIDE,
            frames=VIDEO_FRAMES,
            sample_count=2,
        ),
        run=dataclasses.replace(run, **(changes or {})),
        student=GridStudentConfig(optimizer=OPTIMIZER, ema_decay=0.8, steps=2, shift=3.0),
        **VIDEO_CASES[name],
    )
