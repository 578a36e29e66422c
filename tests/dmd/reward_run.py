"""A complete reward run of a tiny random student: its settings, for every method."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.run_directory import RunDirectory
from fewstep.core.trainer import Trainer
from fewstep.dmd.config import DataConfig, FakeScoreConfig, StudentConfig, TeacherConfig
from fewstep.dmd.reward_config import (
    ChainConfig,
    DecayConfig,
    ForwardConfig,
    MonitorConfig,
    ObjectiveConfig,
    PreferenceConfig,
    ProcessConfig,
    RewardMethod,
    RewardRunConfig,
    RewardSettings,
    ScorerConfig,
)
from fewstep.dmd.reward_setup import RewardData, RewardSetup, build_setup
from fewstep.dmd.train import train_dmd
from fewstep.evaluation.scorer import Scorer
from tests.dmd.tiny_run import TinyInputs, tiny_config

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
# What each method adds to the settings below, in the form of its configuration in configs/dmd.
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
