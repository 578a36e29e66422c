"""A complete reward run of a tiny random student: its settings, for every method."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import DataConfig, FakeScoreConfig, StudentConfig, TeacherConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.config import (
    ChainConfig,
    DecayConfig,
    ForwardConfig,
    MonitorConfig,
    ObjectiveConfig,
    PixelGanConfig,
    PreferenceConfig,
    ProcessConfig,
    RewardMethod,
    RewardRunConfig,
    RewardSettings,
    ScorerConfig,
)
from fewstep.dmd.reward.latent.network import (
    LatentReward,
    LatentRewardRecord,
    LatentRewardShape,
    prompt_vector,
    save_latent_reward,
)
from fewstep.dmd.reward.setup import RewardData, RewardSetup, build_setup
from fewstep.dmd.train import train_dmd
from fewstep.embedded.digits.classifier import WEIGHTS_FILE, DigitsClassifier
from fewstep.evaluation.scorers.scorer import Scorer, ScorerCard
from tests.dmd.tiny_run import TinyInputs, tiny_config
from tests.tiny_pipelines import LATENT_SHAPE

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
# A discriminator that tells samples apart after one update.
QUICK = OptimizerConfig(learning_rate=0.02, weight_decay=0.0)
# What each method adds to the settings below, in the form of its configuration in configs/digits.
METHODS: dict[RewardMethod, dict[str, Any]] = {
    "redmd": {},
    "gndm": {"objective": ObjectiveConfig(matching_reward_draws=2)},
    "nft": {
        "objective": ObjectiveConfig(matching_weight=0.0),
        "forward": ForwardConfig(kl_weight=0.1, old=DecayConfig(slope=0.2)),
    },
    "crd": {
        "objective": ObjectiveConfig(matching_weight=0.0),
        "forward": ForwardConfig(kl_weight=0.1, lowest_kl_weight=1e-4, sampling=DecayConfig(start=0.25)),
    },
    "flow_grpo": {"objective": ObjectiveConfig(matching_weight=0.0), "chain": ChainConfig(kl_weight=0.04)},
    "euphonium": {
        "objective": ObjectiveConfig(matching_weight=0.0),
        "chain": ChainConfig(kl_weight=0.04),
        "process": ProcessConfig(guidance=1.0),
    },
    "flash": {"preference": PreferenceConfig(updates_per_matching=1, inject_decay=0.9)},
    "rtdmd": {
        "objective": ObjectiveConfig(
            matching="ambient",
            matching_steps="last",
            direct_weight=0.1,
            direct_margin=100.0,
            cold_start_steps=1,
            consistency_weight=0.01,
        ),
        "chain": ChainConfig(log_prob="distance", trained_steps=1, clip_range=1e-5),
    },
}


class Brittle:
    """Ink of pictures or clips that fails in one of its calls, or answers nan."""

    def __init__(self, failing_call: int, *, with_nan: bool = False, video: bool = False) -> None:
        self.card = ScorerCard("stroke_weight", 0.0, 1.0, differentiable=True, needs_video=video)
        self.calls, self.failing_call, self.with_nan = 0, failing_call, with_nan

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        scores = pixels.flatten(1).mean(dim=1)
        if self.calls != self.failing_call:
            return scores
        if self.with_nan:
            return scores * torch.tensor(float("nan"))
        raise KeyError("the model forgot a token")


def write_pixel_backbone(folder: Path) -> Path:
    """A folder with a random classifier of the digits, which takes pictures of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        classifier = DigitsClassifier()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), folder / WEIGHTS_FILE)
    return folder


def with_pixel_gan(inputs: TinyInputs, backbone: Path) -> dict[str, Any]:
    """Changes that give flash its discriminator."""
    return {
        "objective.matching_steps": "early",
        "data.latents": str(inputs.latents),
        "pixel_gan": PixelGanConfig(weight=0.5, backbone=str(backbone), head_width=8, optimizer=QUICK),
    }


@torch.no_grad()
def wake_heads(setup: RewardSetup) -> None:
    """Last layers that are not zero: at chance the gradient of their bias is rounding, which Adam enlarges."""
    if setup.pixel_role is None:
        return
    generator = torch.Generator().manual_seed(0)
    for name, weight in setup.pixel_role.parameters:
        if ".logit." in name:
            weight.normal_(generator=generator)


def write_latent_reward(inputs: TinyInputs, folder: Path) -> Path:
    """A random latent reward model for the tiny teacher, whose scores differ between states and prompts."""
    teacher = Teacher.load(inputs.teacher)
    width = prompt_vector(teacher.null_condition).shape[1]
    model = LatentReward(LatentRewardShape(LATENT_SHAPE[0], width, width=8, blocks=2), seed=2)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_latent_reward(model, LatentRewardRecord(("1 slant",), "bradley_terry", 8, 8, 0, 2, ()), folder)
    return folder


def write_student(inputs: TinyInputs, directory: Path, *, steps: int = 2) -> Path:
    """The run directory of a distilled student."""
    changes = {"student.steps": steps, "run.steps": 2, "run.checkpoint_every": 2}
    assert train_dmd(tiny_config(inputs, directory, changes)) == 0
    return directory


def reward_config(
    inputs: TinyInputs, student: Path, directory: Path, method: RewardMethod, changes: Mapping[str, Any] | None = None
) -> RewardRunConfig:
    """Settings of a run of a method; `changes` maps dotted keys to other values."""
    config = RewardRunConfig(
        method=method,
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=2.0),
        data=DataConfig(prompts=str(inputs.prompts), sample_count=2),
        run=RunConfig(
            directory=str(directory),
            seed=5,
            steps=4,
            batch_size=8,
            checkpoint_every=2,
            keep_checkpoints=20,
            sample_every=1000,
            log_every=1,
        ),
        student=StudentConfig(optimizer=OPTIMIZER, steps=2, ema_decay=0.8, init=str(student)),
        fake_score=FakeScoreConfig(optimizer=OPTIMIZER, updates_per_student_update=2),
        reward=RewardSettings(
            scorers=(ScorerConfig(name="stroke_weight", weight=2.0, mean=0.5, std=0.01),),
            held_out=(ScorerConfig(name="slant"),),
            group_size=4,
        ),
        monitor=MonitorConfig(every=2, prompts=2, samples_per_prompt=3),
        **METHODS[method],
    )
    return changed(config, changes or {})


def changed(config: RewardRunConfig, changes: Mapping[str, Any]) -> RewardRunConfig:
    """The settings with other values at dotted keys; each dataclass is checked once, at the end."""
    sections: dict[str, dict[str, Any]] = {}
    whole = {key: value for key, value in changes.items() if "." not in key}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **whole, **replaced)


@contextmanager
def started(config: RewardRunConfig, scorers: Sequence[Scorer] | None = None) -> Iterator[tuple[RewardSetup, Trainer]]:
    """The parts of a run, ready for `train_step`."""
    data = RewardData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    setup = build_setup(config, data, trainer, scorers=scorers)
    try:
        yield setup, trainer
    finally:
        setup.reward.close()
        trainer.close()
