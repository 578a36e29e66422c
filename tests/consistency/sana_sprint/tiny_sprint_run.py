"""A complete SANA-Sprint run of a tiny random SANA: its inputs on disk, its settings and its parts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.consistency.config import ConsistencyConfig, ConsistencyDataConfig
from fewstep.consistency.sana_sprint.config import SprintConfig, SprintConsistencyConfig, SprintDiscriminatorConfig
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.data import LatentDataset
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import GridStudentConfig, TeacherConfig
from tests.dmd.tiny_run import PROMPTS, TinyInputs, changed
from tests.tiny_pipelines import save_pipeline
from tests.tiny_sana import LATENT_SHAPE, build_sana

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
# Of the discriminator.
HEADS: dict[str, Any] = {"optimizer": OPTIMIZER, "head_width": 8}
# Name of a case: what differs from both losses.
CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "consistency": {"sana_sprint.discriminator": None},
    "adversarial": {"sana_sprint.consistency": None},
}


def write_sprint_inputs(folder: Path) -> TinyInputs:
    """A random SANA teacher with dense time, five prompts, and seven latents with four captions between them."""
    teacher = save_pipeline(build_sana(dense=True), folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    latents = 0.3 + 0.9 * sample_noise(9, range(7), LATENT_SHAPE, stream="data")
    LatentDataset(latents, tuple(f"picture {number % 4}" for number in range(7))).save(folder / "latents")
    return TinyInputs(teacher, folder / "prompts.txt", folder / "latents", folder / "pairs")


def tiny_sprint(
    inputs: TinyInputs, directory: Path, name: str = "both", changes: Mapping[str, Any] | None = None
) -> ConsistencyConfig:
    """Settings of a run of one case; `changes` maps dotted keys to other values."""
    config = ConsistencyConfig(
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=1.5),
        data=ConsistencyDataConfig(prompts=str(inputs.prompts), latents=str(inputs.latents), sample_count=2),
        run=RunConfig(
            directory=str(directory),
            seed=5,
            steps=4,
            batch_size=4,
            checkpoint_every=2,
            keep_checkpoints=20,
            sample_every=1000,
            log_every=1,
        ),
        student=GridStudentConfig(optimizer=OPTIMIZER, ema_decay=0.8, steps=2),
        sana_sprint=SprintConfig(
            guidance_scales=(1.0, 2.0),
            time_mean=0.693,
            consistency=SprintConsistencyConfig(check_tangent=False),
            discriminator=SprintDiscriminatorConfig(**HEADS),
        ),
    )
    return changed(config, {**CASES[name], **(changes or {})})
