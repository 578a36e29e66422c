"""A complete reward run on streams of a tiny random student: its settings and parts."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.reward.config import AstrolabeConfig, CausalRewardConfig, PenaltyConfig
from fewstep.causal_video.reward.setup import CausalRewardData, CausalRewardSetup, build_setup
from fewstep.causal_video.stages.sections import CausalStudentConfig, PromptsConfig
from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.settings import TeacherConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.config import MonitorConfig, RewardSettings, ScorerConfig
from fewstep.evaluation.scorers.scorer import Scorer
from tests.causal_video.tiny_causal_run import VideoInputs

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0)
INK = ScorerConfig(name="stroke_weight", mean=0.5, std=0.01)
SLANT = ScorerConfig(name="slant", weight=0.5, std=0.1)


def reward_settings(
    inputs: VideoInputs, directory: Path, changes: Mapping[str, Any] | None = None
) -> CausalRewardConfig:
    """Windows of two chunks in streams of five, a cache that forgets.

    `changes` maps dotted keys to other values; those of "penalty" are fields of astrolabe.penalty.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    parts: dict[str, Any] = {
        "teacher": TeacherConfig(path=str(inputs.teacher), guidance=2.0),
        "data": PromptsConfig(prompts=str(inputs.prompts), height=32, width=32, sample_count=1),
        "run": RunConfig(
            directory=str(directory),
            seed=5,
            steps=2,
            batch_size=8,
            checkpoint_every=1,
            keep_checkpoints=20,
            sample_every=1000,
            log_every=1,
        ),
        "student": CausalStudentConfig(
            optimizer=OPTIMIZER,
            layout=(1, 1, 1),
            policy=CachePolicy(2, 1, "static"),
            steps=(3, 2),
            ema_decay=0.8,
            init=str(inputs.init),
        ),
        "reward": RewardSettings(scorers=(INK, SLANT), held_out=(ScorerConfig(name="clip_light"),), group_size=4),
        "astrolabe": AstrolabeConfig(
            chunks=2, longest_chunks=5, penalty=PenaltyConfig(weight=0.1, auxiliary=("slant",))
        ),
        "monitor": MonitorConfig(every=1, prompts=2, samples_per_prompt=2),
    }
    if "penalty" in sections:
        penalty = dataclasses.replace(parts["astrolabe"].penalty, **sections["penalty"])
        sections.setdefault("astrolabe", {})["penalty"] = penalty
    changed = {name: dataclasses.replace(part, **sections.get(name, {})) for name, part in parts.items()}
    return CausalRewardConfig(**changed)


@contextmanager
def started(
    config: CausalRewardConfig, scorers: Sequence[Scorer] | None = None
) -> Iterator[tuple[CausalRewardSetup, Trainer]]:
    """The parts of a run, ready for `train_step`."""
    data = CausalRewardData.read(config)
    trainer = Trainer(config.run, RunDirectory(config.run.directory), cpu=True)
    setup = build_setup(config, data, trainer, scorers=scorers)
    try:
        yield setup, trainer
    finally:
        setup.reward.close()
        trainer.close()
