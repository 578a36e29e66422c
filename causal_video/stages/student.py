"""Networks of a run and their weights: the causal student, its input channels, and a bidirectional teacher with them.

Legend: C latent channels, K control channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fewstep.causal_video.model.controls import SteeredWanFamily
from fewstep.causal_video.model.network import TIME_SCALE, CausalWan
from fewstep.causal_video.settings import FILE_NAME, load_defaults
from fewstep.causal_video.stages.config import CausalStudentConfig
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.wan import WanFamily
from fewstep.core.lora import add_lora
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import STATE_FILE, latest_checkpoint, verify_checkpoint
from fewstep.core.weights import EMA_FILE

PATCHES = "patch_embedding.weight"


def build_student(
    settings: CausalStudentConfig, teacher: Teacher, init: Path | None, *, seed: int, controls: int = 0
) -> CausalWan:
    """A trainable fp32 copy of the teacher's network under causal attention, with adapters if asked.

    `controls` is K; without `init` the student then begins as the teacher, whatever its controls say.
    Raises ValueError for a teacher that is no Wan, or weights that do not fit.
    """
    network = teacher.denoiser.copy().float().network
    if not isinstance(teacher.family, WanFamily) or not isinstance(network, WanTransformer3DModel):
        raise ValueError(f"causal students are made of Wan teachers, and {teacher.path} is {teacher.family.name}")
    if teacher.family.time_scale != TIME_SCALE:
        raise ValueError(
            f"the teacher's scheduler counts {teacher.family.time_scale} timesteps, and a causal student is told "
            f"{TIME_SCALE:g} t: set num_train_timesteps to {TIME_SCALE:g}"
        )
    if controls > 0:
        network = widened(network, controls)
    if init is not None:
        load_transformer(network, init)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if settings.lora_rank > 0:
        targets = teacher.family.lora_targets
        add_lora(network, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=targets, seed=seed)
    return CausalWan(network)


def widened(network: WanTransformer3DModel, controls: int) -> WanTransformer3DModel:
    """A copy with K more input channels behind those of the latents, whose weights are zero: the same function.

    Raises ValueError for a network that takes conditioning channels already.
    """
    taken, latent = network.config["in_channels"], network.config["out_channels"]
    if taken != latent:
        raise ValueError(
            f"the teacher takes {taken - latent} conditioning channels already: controls are added to a text-to-video "
            "network"
        )
    with torch.random.fork_rng(devices=[]):
        wide = WanTransformer3DModel.from_config({**network.config, "in_channels": taken + controls})
    assert isinstance(wide, WanTransformer3DModel)
    # Copies keep the dtype of each weight, which is not one for all where some stay in fp32.
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weight = state[PATCHES]
    state[PATCHES] = torch.cat([weight, weight.new_zeros(weight.shape[0], controls, *weight.shape[2:])], dim=1)
    wide.load_state_dict(state, assign=True)
    nn.Module.to(wide, weight.device)
    return wide.train(network.training)


def find_weights(init: str, key: str = "student.init") -> Path:
    """The safetensors file that a setting such as `student.init` means: a file, or the averaged weights of a checkpoint
    or of a run's latest one.

    Raises:
        ValueError: there is none, or the checkpoint is damaged.
    """
    path = Path(init)
    if path.is_file():
        return path
    checkpoint = path if (path / STATE_FILE).is_file() else latest_checkpoint(path) if path.is_dir() else None
    if checkpoint is None:
        raise ValueError(
            f"{key} {init} is no file, no checkpoint and no run directory with checkpoints: give one of them"
        )
    verify_checkpoint(checkpoint)
    weights = checkpoint / f"{EMA_FILE}.safetensors"
    if not weights.is_file():
        raise ValueError(f"{key} {checkpoint} holds no {weights.name}: it is no checkpoint of a student")
    return weights


def check_names(init: str, names: tuple[str, ...], key: str = "student.init") -> None:
    """Raise ValueError where the run or export that holds the weights says that they know other controls than these."""
    path = Path(init).resolve()
    # A run itself, one of its checkpoints, or a file in one or in the transformer of an export.
    holding = [folder for folder in (path, *path.parents[:3]) if (folder / FILE_NAME).is_file()]
    known = load_defaults(holding[0]).actions if holding else names
    if known != names:
        raise ValueError(
            f"{key} {init} knows the controls {list(known)}, and data.controls has {list(names)}: a stage goes on with "
            "the controls of the one before, in their order"
        )


def load_transformer(network: WanTransformer3DModel, path: Path, key: str = "student.init") -> None:
    """Load the weights of a causal student or of an ordinary Wan transformer into a network.

    Raises ValueError when the file is unreadable, or does not hold exactly this network's weights.
    """
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{key} {path} cannot be read ({error}); give a .safetensors file") from error
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # An average holds all floating buffers, also the table of positions that no state_dict has.
    computed = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    plain = {name: tensor for name, tensor in plain.items() if name not in computed}
    stored, own = plain.get(PATCHES), network.state_dict()[PATCHES]
    if stored is not None and stored.ndim == own.ndim and stored.shape[1] != own.shape[1]:
        latent = network.config["out_channels"]
        raise ValueError(
            f"{key} {path} takes {stored.shape[1] - latent} control channels beside {latent} of latents, and this run "
            f"has {own.shape[1] - latent}: give data.controls with the channels that these weights were trained with, "
            "or weights that fit"
        )
    missing, unexpected = network.load_state_dict(plain, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{key} {path} does not fit the teacher's network: {len(missing)} weights missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}. A run with adapters stores these alone: "
            "export it, and give the transformer of the export"
        )


def steer_teacher(teacher: Teacher, weights: Path, controls: int) -> None:
    """Give a teacher K control channels and the weights of a bidirectional network that knows them.

    Its denoiser, and every copy of it such as the fake score, then needs a condition with controls. The pipeline keeps
    the network that it was loaded with. Raises ValueError for weights that do not fit.
    """
    network, family = teacher.denoiser.network, teacher.family
    assert isinstance(network, WanTransformer3DModel)
    assert isinstance(family, WanFamily)
    wide = widened(network, controls)
    load_transformer(wide, weights, "steered_teacher")
    wide.requires_grad_(False).eval()
    teacher.family = SteeredWanFamily(family.time_scale, family.text_tokens, family.time_per_token)
    teacher.denoiser = Denoiser(wide, teacher.family)
