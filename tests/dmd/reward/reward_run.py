"""A complete reward run of a tiny random student: its settings, for every method."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import FakeScoreConfig, SampleDataConfig, TeacherConfig
from fewstep.core.teacher import Teacher
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.config import (
    AmbientConfig,
    MonitorConfig,
    RewardMatchingConfig,
    RewardRunConfig,
    RewardSettings,
    RewardStudentConfig,
    ScorerConfig,
)
from fewstep.dmd.reward.latent.network import (
    LatentReward,
    LatentRewardRecord,
    LatentRewardShape,
    prompt_vector,
    save_latent_reward,
)
from fewstep.dmd.reward.methods.table import build_method, needs_of
from fewstep.dmd.reward.sections import (
    CrdConfig,
    DecayConfig,
    DirectConfig,
    EuphoniumConfig,
    FlashConfig,
    FlowGrpoConfig,
    GndmConfig,
    NftConfig,
    PixelGanConfig,
    RedmdConfig,
    RtdmdConfig,
)
from fewstep.dmd.reward.setup import RewardData, RewardSetup, build_setup
from fewstep.dmd.reward.student_step import RewardMethod
from fewstep.dmd.train import train_dmd
from fewstep.embedded.digits.classifier import WEIGHTS_FILE, DigitsClassifier
from fewstep.evaluation.scorers.scorer import Scorer, ScorerCard
from tests.dmd.tiny_run import TinyInputs, changed, tiny_config
from tests.tiny_pipelines import LATENT_SHAPE

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
# A discriminator that tells samples apart after one update.
QUICK = OptimizerConfig(learning_rate=0.02, weight_decay=0.0)
FAKE_SCORE = FakeScoreConfig(optimizer=OPTIMIZER, ratio=2)
# Sections that let a method match.
MATCHED: dict[str, Any] = {"matching": RewardMatchingConfig(), "fake_score": FAKE_SCORE}
# What each method adds to the settings below, in the form of its configuration in configs/digits.
METHODS: dict[str, dict[str, Any]] = {
    "redmd": {"redmd": RedmdConfig(), **MATCHED},
    "gndm": {"gndm": GndmConfig(matching_reward_draws=2), **MATCHED},
    "nft": {"nft": NftConfig(kl_weight=0.1, old=DecayConfig(slope=0.2))},
    "crd": {"crd": CrdConfig(kl_weight=0.1, lowest_kl_weight=1e-4, sampling=DecayConfig(start=0.25))},
    "flow_grpo": {"flow_grpo": FlowGrpoConfig(kl_weight=0.04)},
    "euphonium": {"euphonium": EuphoniumConfig(kl_weight=0.04, guidance=1.0)},
    "flash": {"flash": FlashConfig(updates_per_matching=1, inject_decay=0.9), **MATCHED},
    "rtdmd": {
        "rtdmd": RtdmdConfig(
            log_prob="distance", trained_steps=1, clip_range=1e-5, direct=DirectConfig(weight=0.1, margin=100.0)
        ),
        "matching": RewardMatchingConfig(
            steps="last", cold_start_steps=1, ambient=AmbientConfig(consistency_weight=0.01)
        ),
        "fake_score": FAKE_SCORE,
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


def with_pixel_gan(inputs: TinyInputs, backbone: Path, **others: Any) -> dict[str, Any]:
    """Changes that give flash its discriminator; `others` are settings of it."""
    settings: dict[str, Any] = {"weight": 0.5, "head_width": 8, "optimizer": QUICK, **others}
    gan = PixelGanConfig(latents=str(inputs.latents), backbone=str(backbone), **settings)
    return {"matching.steps": "early", "flash.pixel_gan": gan}


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
    inputs: TinyInputs, student: Path, directory: Path, method: str, changes: Mapping[str, Any] | None = None
) -> RewardRunConfig:
    """Settings of a run of a method; `changes` maps dotted keys to other values, bare names to other sections."""
    config = RewardRunConfig(
        teacher=TeacherConfig(path=str(inputs.teacher), guidance=2.0),
        data=SampleDataConfig(prompts=str(inputs.prompts), sample_count=2),
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
        student=RewardStudentConfig(optimizer=OPTIMIZER, steps=2, ema_decay=0.8, init=str(student)),
        reward=RewardSettings(
            scorers=(ScorerConfig(name="stroke_weight", weight=2.0, mean=0.5, std=0.01),),
            held_out=(ScorerConfig(name="slant"),),
            group_size=4,
        ),
        monitor=MonitorConfig(every=2, prompts=2, samples_per_prompt=3),
        **METHODS[method],
    )
    return changed(config, changes or {})


@contextmanager
def started(config: RewardRunConfig, scorers: Sequence[Scorer] | None = None) -> Iterator[tuple[RewardMethod, Trainer]]:
    """The method of a run with its parts, ready for `train_step`."""
    needs = needs_of(config)
    data = RewardData.read(config, needs)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    setup = build_setup(config, needs, data, trainer, scorers=scorers)
    try:
        yield build_method(config, setup), trainer
    finally:
        setup.reward.close()
        trainer.close()
