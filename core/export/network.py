"""A network of a run in a copy of its model's folder, from which roles of another run start.

Adapters are merged: a run that begins with fresh adapters on a distilled student or on its fake score (RTDMD's reward
stage) names the folders as `student.path` and `fake_score.path`. All other files are those of the model, byte for byte.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from fewstep.core.config import OptimizerConfig
from fewstep.core.export.directory import check_finite, new_directory
from fewstep.core.export.run import find_checkpoint, load_base, load_run_student
from fewstep.core.networks.build import build_fake_score
from fewstep.core.networks.experts import Experts
from fewstep.core.networks.lora import lora_layers, merge_lora
from fewstep.core.run_settings import RunSettings, read_settings
from fewstep.core.settings import FakeScoreConfig, ModelSource
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import fetch, variant_of
from fewstep.core.training.run_directory import CONFIG_FILE
from fewstep.core.weights import NETWORK_FOLDERS, StoredWeights

ONE_FILE = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
NetworkRole = Literal["student", "student_live", "fake_score"]


def export_network(
    run: str | Path,
    output: str | Path,
    *,
    role: NetworkRole = "student",
    checkpoint: str = "latest",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a folder in diffusers' layout whose network is that of a role; gives its path.

    Args:
        run: run directory of a student.
        output: folder to create.
        role: the student's average, its live weights, or the fake score, whose heads are left out.
        checkpoint: as of `export_run`.
        dtype: of the network's file.

    Raises:
        ValueError: the run or the role is not there, its network is no stock one, or a weight is not finite.
        FileExistsError: `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists; give another folder, or remove it yourself")
    settings = read_settings(run)
    if settings.second_time != "none" or settings.guidance_embedded:
        raise ValueError(
            f"{run}: a network that is told a second time or its guidance is no stock one: export its student"
        )
    if role == "fake_score":
        source, teacher, network = _fake_score(Path(run), settings, checkpoint)
    else:
        weights = "ema" if role == "student" else "live"
        loaded = load_run_student(Path(run), settings, checkpoint=checkpoint, weights=weights)
        source, teacher, network = settings.base, loaded.teacher, loaded.student.denoiser.network
    if isinstance(network, Experts):
        raise ValueError(f"{run}: its network is two experts, and this writes one; export its student")
    network = copy.deepcopy(network)
    if lora_layers(network):
        merge_lora(network)
    stored: Any = network.to(dtype)
    check_finite(stored.state_dict(), dtype)
    folder = fetch(source)
    name = next(name for name in NETWORK_FOLDERS if getattr(teacher.pipeline, name, None) is not None)
    with new_directory(output) as draft:
        shutil.copytree(folder, draft, dirs_exist_ok=True, ignore=_without(folder, name))
        # As the roles that start from it look for it: plain, unless all other weights are of one variant.
        stored.save_pretrained(draft / name, safe_serialization=True, variant=variant_of(folder, None))
    return output


def _fake_score(run: Path, settings: RunSettings, checkpoint: str) -> tuple[ModelSource, Teacher, nn.Module]:
    """The model that a run's fake score is of, loaded, and its network."""
    file = run / CONFIG_FILE
    values = yaml.safe_load(file.read_text(encoding="utf-8")).get("fake_score") if file.is_file() else None
    stored = find_checkpoint(run, checkpoint) / "fake_score.safetensors"
    if values is None or not stored.is_file():
        raise ValueError(f"{run} has no fake score: give the run of a method that trains one")
    if values.get("told_exit"):
        raise ValueError(f"{run}: its fake score is told the exit of its samples, which no stock network is")
    source = settings.teacher if values["path"] is None else ModelSource(path=values["path"])
    has_adapters, bits = values["lora_rank"] > 0, settings.teacher_quantise if values["path"] is None else "none"
    teacher = load_base(source, settings.teacher_dtype, bits, has_adapters=has_adapters, device="cpu")
    kept = {name: values[name] for name in ("lora_rank", "lora_alpha")}
    kept["lora_targets"] = tuple(values["lora_targets"])
    fake = FakeScoreConfig(optimizer=OptimizerConfig(learning_rate=1.0), **kept)
    weights = StoredWeights("run", str(run), (stored,))
    return source, teacher, build_fake_score(fake, teacher, weights, seed=0).denoiser.network


def _without(folder: Path, name: str) -> Any:
    """Leaves out, at the top, the network's own folder, hidden ones, and checkpoints in one file."""

    def ignored(place: str, names: list[str]) -> list[str]:
        if Path(place) != folder:
            return []
        return [each for each in names if each == name or each.startswith(".") or each.endswith(ONE_FILE)]

    return ignored
