"""A complete DMD run of a tiny random Stable Diffusion 3: its inputs on disk and its settings.

One step takes about 0.05 s on one core.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.data import LatentDataset
from fewstep.core.latent_sources import teacher_pairs
from fewstep.core.randomness import sample_noise
from fewstep.core.settings import SampleDataConfig, SteppingStudentConfig, TeacherConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import Checkpoint
from fewstep.core.training.run_directory import RunDirectory, read_metrics
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import DmdConfig, DmdFakeScoreConfig, DmdObjective, GanConfig, RegressionConfig
from fewstep.dmd.setup import DmdData, DmdSetup, build_setup
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, save_pipeline

PROMPTS = ("a red cat", "two dogs", "blue 7", "house 42", "green tree")

Config = TypeVar("Config")


@dataclass(frozen=True)
class TinyInputs:
    """Paths of what a run reads."""

    teacher: Path
    prompts: Path
    latents: Path
    pairs: Path


def with_gan(inputs: TinyInputs) -> GanConfig:
    """A discriminator that sees the tiny latents."""
    return GanConfig(latents=str(inputs.latents), weight=0.1, discriminator_weight=0.5)


def with_regression(inputs: TinyInputs) -> RegressionConfig:
    """A regression on the tiny pairs."""
    return RegressionConfig(pairs=str(inputs.pairs), weight=0.25)


# Changes whose files are those of the inputs.
WITH_GAN: dict[str, Any] = {"gan": with_gan}
WITH_REGRESSION: dict[str, Any] = {"regression": with_regression}


def write_inputs(folder: Path) -> TinyInputs:
    """A random teacher, five prompts, seven latents with captions, and six teacher pairs."""
    teacher = save_pipeline(build_sd3(), folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    latents = 0.5 + 0.8 * sample_noise(9, range(7), LATENT_SHAPE, stream="data")
    LatentDataset(latents, tuple(f"picture {number}" for number in range(7))).save(folder / "latents")
    pairs = teacher_pairs(Teacher.load(teacher), PROMPTS, count=6, steps=3, guidance=2.0, seed=3)
    pairs.save(folder / "pairs")
    return TinyInputs(teacher, folder / "prompts.txt", folder / "latents", folder / "pairs")


def tiny_config(inputs: TinyInputs, directory: Path, changes: Mapping[str, Any] | None = None) -> DmdConfig:
    """Settings of a run on these inputs; `changes` maps dotted keys to other values, or to functions of
    the inputs."""
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
    config = DmdConfig(
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=2.0),
        data=SampleDataConfig(prompts=str(inputs.prompts), sample_count=2),
        run=RunConfig(
            directory=str(directory),
            seed=5,
            steps=4,
            batch_size=4,
            checkpoint_every=3,
            keep_checkpoints=20,
            sample_every=1000,
            log_every=1,
        ),
        student=SteppingStudentConfig(optimizer=optimizer, ema_decay=0.8),
        fake_score=DmdFakeScoreConfig(optimizer=optimizer, ratio=2),
        dmd=DmdObjective(),
    )
    told = {key: value(inputs) if callable(value) else value for key, value in (changes or {}).items()}
    return changed(config, told)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The settings with other values at dotted keys such as `run.steps`, or other sections at bare names.

    Each dataclass is checked once, at the end.
    """
    sections: dict[str, dict[str, Any]] = {}
    replaced: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
        else:
            replaced[section] = value
    whole: Any = config
    replaced |= {
        name: dataclasses.replace(replaced.get(name, getattr(config, name)), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(whole, **replaced)


def start(config: DmdConfig) -> tuple[DmdSetup, Trainer]:
    """The parts of a run, ready for `train_step`. Close the trainer at the end."""
    data = DmdData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    return build_setup(config, data, trainer), trainer


def measured(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its notes and timings."""
    records = read_metrics(directory / "metrics.jsonl")
    return [
        {name: value for name, value in record.items() if name != "seconds_per_step"}
        for record in records
        if "note" not in record
    ]


def assert_same_checkpoint(left: Checkpoint, right: Checkpoint) -> None:
    """Weights, EMA, optimizer and generator states bit for bit, and the JSON state."""
    assert left.step == right.step
    assert left.state == right.state
    assert left.tensors.keys() == right.tensors.keys()
    for name, group in left.tensors.items():
        assert group.keys() == right.tensors[name].keys()
        different = [key for key, tensor in group.items() if not torch.equal(tensor, right.tensors[name][key])]
        assert len(different) == 0, (name, different)
