"""What a run directory holds of a causal student: its settings, its weights, its size.

Both kinds of runs are read: stages of scripts/train_causal_video.py, and those of scripts/train_causal_reward.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
import yaml
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import (
    FILE_NAME,
    STOCK_RATE,
    CausalSettings,
    StreamDefaults,
    load_defaults,
    read_file,
)
from fewstep.causal_video.stages.batch import causal_settings
from fewstep.causal_video.stages.config import CausalConfig, FlowMapStage
from fewstep.causal_video.stages.ode import OdePairs
from fewstep.causal_video.stages.student import build_student
from fewstep.core.config import load_config
from fewstep.core.data import LatentDataset
from fewstep.core.networks.adapters import round_weights
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.run_directory import CONFIG_FILE
from fewstep.core.weights import EMA_FILE, LIVE_FILE, find_weights

RunOfStudent: TypeAlias = CausalConfig | CausalRewardConfig
ConfigT = TypeVar("ConfigT")

STUDENT_PREFIX = "transformer."


def read_causal_run(run: Path) -> RunOfStudent:
    """The resolved configuration of a run. Raises ValueError where there is none, or one of another method."""
    file = run / CONFIG_FILE
    if not file.is_file():
        raise ValueError(
            f"{file} does not exist; give the directory of a run of scripts/train_causal_video.py or "
            "train_causal_reward.py"
        )
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    is_reward = isinstance(said, Mapping) and not said.keys().isdisjoint(CausalRewardConfig.METHODS)
    return read_as(CausalRewardConfig, file) if is_reward else read_as(CausalConfig, file)


def read_as(config_class: type[ConfigT], file: Path) -> ConfigT:
    """The configuration that a run wrote. Raises ValueError where it is one of another kind."""
    return load_config(config_class, ["--config", str(file)], prog="export", description="")[0]


def is_flow(config: RunOfStudent) -> bool:
    """Whether the student of a run takes many steps of an ODE with guidance; others take those of their schedule."""
    return isinstance(config, CausalConfig) and config.is_flow


def trained_controls(run: Path, config: RunOfStudent) -> tuple[str, ...]:
    """Names of the control channels of a run's student, from its causal_video.json; none for a student of text.

    Raises ValueError where the run was trained with controls and does not say which.
    """
    if not isinstance(config, CausalConfig) or config.data.controls is None:
        return ()
    names = load_defaults(run).actions
    if not names:
        raise ValueError(
            f"{run} was trained with data.controls, and its causal_video.json names none under stream.actions: bring "
            "the file of the training back"
        )
    return names


def trained_guidance(config: RunOfStudent) -> float:
    """The guidance of what a run distilled: of its causal teacher, where that has its own."""
    said = config.causal_teacher if isinstance(config, CausalConfig) else None
    return config.teacher.guidance if said is None or said.guidance is None else said.guidance


def trained_times(config: RunOfStudent, settings: CausalSettings) -> tuple[tuple[float, ...], ...]:
    """Times of each chunk in the training; those of the export for flow maps on clean context, trained at all times."""
    is_map = isinstance(config, CausalConfig) and isinstance(config.stage, FlowMapStage)
    return settings.schedule.times if is_map else causal_settings(config.student).schedule.times


def trained_smoothing(run: Path) -> float:
    """How far the time of a run's student is smoothed; 0 where the run says nothing."""
    file = run / FILE_NAME
    return float(read_file(file).get("time_smoothing", 0.0)) if file.is_file() else 0.0


def settings_of_run(config: RunOfStudent, steps: Sequence[int] | None) -> CausalSettings:
    """Layout, policy and schedule of the export. Raises ValueError for a stage without steps, and none given."""
    settings = causal_settings(config.student)
    if steps is not None:
        return replace(settings, schedule=StepSchedule.steps(list(steps), shift=config.student.shift))
    if is_flow(config):
        raise ValueError(
            f"the stage {config.method} trains a many-step student of a flow, which has no schedule: export a later "
            "stage, or give steps (such as --steps 20), which stream without guidance"
        )
    return settings


def load_run_network(
    config: RunOfStudent, teacher: Teacher, checkpoint: Path, weights: str, controls: int = 0
) -> tuple[WanTransformer3DModel, int]:
    """The student's transformer with the weights of a checkpoint, adapters unmerged, and the step they are of.

    `controls` counts the channels it takes beside the latents.

    Raises:
        ValueError: the weights are missing, or do not fit the teacher.
    """
    loaded = load_checkpoint(checkpoint)
    name = EMA_FILE if weights == "ema" else LIVE_FILE
    if name not in loaded.tensors:
        raise ValueError(f"the checkpoint has no {name}.safetensors, only {', '.join(loaded.tensors)}; change weights")
    # Adapters sit on the weights of the stage before; all others are in the checkpoint.
    has_base = config.student.lora_rank > 0 and config.student.init is not None
    init = find_weights(str(config.student.init)) if has_base else None
    # The teacher given is of the student's own model already.
    student = replace(config.student, path=None)
    network = build_student(student, teacher, init, seed=config.run.seed, controls=controls).transformer
    if student.lora_rank > 0:
        # What the adapters were trained on: the teacher's or the stage's weights in the dtype of the teacher.
        round_weights(network, getattr(torch, config.teacher.dtype))
    network.disable_gradient_checkpointing()
    load_trained(network, loaded.tensors[name], source=str(checkpoint))
    return network, loaded.step


def load_trained(network: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load what a checkpoint holds of a student: all weights, or its adapters.

    Raises:
        ValueError: weights that were trained are missing, or there are others.
    """
    computed = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    plain = {name.removeprefix(STUDENT_PREFIX): tensor for name, tensor in tensors.items()}
    plain = {name: tensor for name, tensor in plain.items() if name not in computed}
    missing, unexpected = network.load_state_dict(plain, strict=False)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    lost = sorted(trained & set(missing))
    if lost or unexpected:
        raise ValueError(
            f"the weights of {source} do not fit the teacher: {len(lost)} missing {lost[:3]}, {len(unexpected)} "
            f"unexpected {unexpected[:3]}. Was it exchanged, or student.lora_rank changed?"
        )


def stream_defaults(config: RunOfStudent, teacher: Teacher) -> StreamDefaults:
    """The size that the student was trained at: the configured one, or that of its videos; else the teacher's own.

    Raises:
        ValueError: the videos that say it are no longer there.
    """
    height, width = config.data.height, config.data.width
    if height is None and width is None and isinstance(config, CausalConfig):
        stored = trained_videos(config)
        if stored is not None:
            factor = teacher.pipeline.components["vae"].config["scale_factor_spatial"]
            height, width = (int(side) * factor for side in stored.shape[-2:])
    return StreamDefaults(height, width, STOCK_RATE)


def trained_videos(config: CausalConfig) -> Tensor | None:
    """The stored latents [N, C, F, h, w] that a stage learned from, None where it learned from none.

    Raises:
        ValueError: their folder is no longer there.
    """
    pairs = None if config.ode is None else config.ode.pairs
    for key, folder in (("data.latents", config.data.latents), ("ode.pairs", pairs)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(
                f"the run does not say its size: data.height and width are empty, and {key} ({folder}) is no folder "
                "here any more. Bring it back, or write the size into config.yaml of the run"
            )
    if pairs is not None:
        return OdePairs.load(pairs).latents
    return None if config.data.latents is None else LatentDataset.load(config.data.latents).latents
