"""Networks of roles that start from another model than the teacher, such as a student of 1.3 B under one of 14 B.

Both live in one latent space: latents, text, time and noise mean the same to both, which their JSON files say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.families.table import config_components
from fewstep.core.networks.guidance_off import drop_guidance_off
from fewstep.core.settings import ModelSource, TeacherConfig, TrainedConfig
from fewstep.core.teacher_files import check_teacher, fetch_network, local_folder, read_configs, variant_of

# Bytes at both ends of a large file that stand for it.
WINDOW = 2**24
# What decides how a network is called and what its inputs and outputs mean, by component. The size of it is not here.
SAME: dict[str, tuple[str, ...]] = {
    "": ("_class_name", "expand_timesteps", "force_zeros_for_empty_prompt"),
    "transformer": (
        "in_channels",
        "out_channels",
        "patch_size",
        "joint_attention_dim",
        "pooled_projection_dim",
        "caption_channels",
        "text_dim",
        "freq_dim",
        "timestep_scale",
    ),
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type"),
    "scheduler": (
        "num_train_timesteps",
        "prediction_type",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "rescale_betas_zero_snr",
    ),
    "vae": ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std"),
}


def check_models(teacher: TeacherConfig, **roles: TrainedConfig | None) -> None:
    """Check from JSON files alone the teacher and the models that roles start from, by their sections' names.

    Raises:
        ValueError: one cannot be used, or a role's model is of another latent space than the teacher.
    """
    for name, settings in roles.items():
        copied = settings is not None and settings.lora_rank == 0 and settings.path is None
        if teacher.quantise != "none" and copied:
            raise ValueError(
                f"{name}.lora_rank is 0, which trains a copy of all weights, and teacher.quantise is "
                f"{teacher.quantise}: train adapters, or give {name}.path, a model that is not quantised"
            )
    check_teacher(teacher)
    for name, settings in roles.items():
        if settings is not None:
            check_source(teacher, settings.path, f"{name}.path")


def check_source(teacher: TeacherConfig, path: str | None, key: str) -> None:
    """Check from JSON files alone a model of the teacher's latent space; nothing where there is none. Raises ValueError
    that names the setting `key`."""
    if path is None:
        return
    source = ModelSource(path=path)
    try:
        check_teacher(source)
    except ValueError as error:
        raise ValueError(f"{key} {path} cannot be used: {error}") from error
    require_same_space(teacher, source, key)


def require_same_space(teacher: ModelSource, other: ModelSource, key: str) -> None:
    """Raise ValueError where two models differ in what latents, text, time or noise mean; names the setting `key`."""
    index = read_configs(teacher, ())[""]
    components = config_components(str(index["_class_name"]))
    ours, theirs = (read_configs(source, components) for source in (teacher, other))
    for component, name, here, there in _differences(ours, theirs):
        where = component or "model_index.json"
        raise ValueError(
            f"{key} {other.path} has {name} {there} in {where}, and the teacher {teacher.path} has {here}: a role can "
            "start from another size of the same model, and not from another latent space, text or noise"
        )
    require_same_weights(teacher, other, key)


def require_same_weights(teacher: ModelSource, other: ModelSource, key: str) -> None:
    """Raise ValueError where two folders hold other text encoders or autoencoders: training encodes with the teacher's,
    and an export takes those of the student's own model. Of the hub this is not looked at."""
    folders = [local_folder(source) for source in (teacher, other)]
    for component in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        prints = [fingerprint(folder / component) for folder in folders if folder is not None]
        if len(prints) == 2 and prints[0] != prints[1]:
            raise ValueError(
                f"{key} {other.path} has another {component} than the teacher {teacher.path}, or the same in another "
                "precision: what the student is told, or makes, would be another thing in its export; give a model "
                "that shares it"
            )


def fingerprint(folder: Path) -> str:
    """A hash of the weights in a folder: of files that are large, of their sizes, beginnings and ends."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            if size <= 2 * WINDOW:
                digest.update(opened.read())
                continue
            digest.update(opened.read(WINDOW))
            opened.seek(-WINDOW, 2)
            digest.update(opened.read())
    return digest.hexdigest()


def _differences(
    ours: Mapping[str, Mapping[str, Any]], theirs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, Any, Any]]:
    for component, names in SAME.items():
        here, there = ours.get(component, {}), theirs.get(component, {})
        for name in names:
            if here.get(name) != there.get(name):
                yield component, name, here.get(name), there.get(name)


def load_network(like: nn.Module, component: str, path: str, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen network of another model: the same component of the same class as `like`. Raises ValueError."""
    folder = fetch_network(ModelSource(path=path), component)
    kind: Any = type(like)
    variant = variant_of(folder.parent, None)
    try:
        network = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, variant=variant)
    except OSError as error:
        raise ValueError(f"the {component} of {path} cannot be read ({error}): download its folder again") from error
    drop_guidance_off(network)
    return network.requires_grad_(False).eval().to(device)
