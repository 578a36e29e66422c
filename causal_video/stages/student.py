"""Networks of a run and their weights: the causal student, its input channels, and a bidirectional teacher with them.

Legend: C latent channels, K control channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.causal_video.model.controls import SteeredWanFamily, add_features, controls_of, features_of
from fewstep.causal_video.model.network import TIME_SCALE, CausalWan
from fewstep.causal_video.settings import FILE_NAME, SecondTime, load_defaults
from fewstep.causal_video.stages.sections import CausalStudentConfig
from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.anyflow import check_anyflow_parts
from fewstep.core.families.wan import WanFamily
from fewstep.core.networks.build import add_adapters
from fewstep.core.networks.quantised import dequantise
from fewstep.core.tangents.smooth import smooth_time
from fewstep.core.teacher import Teacher
from fewstep.core.two_time import SITES, add_second_time, second_time_of
from fewstep.core.weights import StoredWeights, load_weights

PATCHES = "patch_embedding.weight"
WAN = "WanTransformer3DModel"


def build_student(
    settings: CausalStudentConfig,
    teacher: Teacher,
    init: StoredWeights | None,
    *,
    seed: int,
    controls: int = 0,
    smoothing: float = 0.0,
) -> CausalWan:
    """A trainable fp32 copy of the teacher's network under causal attention, or adapters on the teacher's own weights.

    `controls` is K; without `init` the student then begins as the teacher, whatever its controls are. `smoothing` is
    that of its time (`core.tangents.smooth`), of both where it has two; what `init` has of it counts.
    Raises ValueError for a teacher that is no Wan, or weights that do not fit.
    """
    has_adapters = settings.lora_rank > 0
    shared = has_adapters and init is None and controls == 0
    # Adapters sit on the teacher's own weights, or on frozen ones of the stage before, in the dtype of the teacher.
    start = teacher.base(settings.path)
    base = start.beside() if shared else start.copy()
    if not shared:
        # Weights of a stage before are loaded into it, which 8 bits would not take.
        dequantise(base.network)
    network = (base if has_adapters else base.float()).network
    if not isinstance(teacher.family, WanFamily) or not isinstance(network, WanTransformer3DModel):
        raise ValueError(f"causal students are made of Wan teachers, and {teacher.path} is {teacher.family.name}")
    if teacher.family.time_scale != TIME_SCALE:
        raise ValueError(
            f"the teacher's scheduler counts {teacher.family.time_scale} timesteps, and a causal student gets "
            f"{TIME_SCALE:g} t: set num_train_timesteps to {TIME_SCALE:g}"
        )
    if controls > 0:
        network = with_channels(network, controls, settings.controls_in)
    if init is not None:
        load_stage(network, init, settings.second_time)
    if settings.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if has_adapters:
        add_adapters(network, of_both_times(settings, network), teacher.family, seed=seed)
        train_second_time(network)
        features = features_of(network)
        if features is not None:
            features.requires_grad_(True)
    if settings.second_time != "none":
        check_causal_map(network)
    if settings.second_time != "none" and second_time_of(network) is None:
        # After adapters, which freeze what is there.
        add_second_time(network, settings.second_time)
    smooth_time(network, smoothing, time_scale=TIME_SCALE, already=smoothing_of(init))
    return CausalWan(network)


def smoothing_of(weights: StoredWeights | None) -> float:
    """How far the time of stored weights was smoothed, as their run or export states it; 0 where nothing is."""
    return 0.0 if weights is None else float(weights.stated("time_smoothing") or 0.0)


def of_both_times(settings: CausalStudentConfig, network: nn.Module) -> CausalStudentConfig:
    """The settings with targets of adapters that mean the layers of both times, where a network has two already."""
    if second_time_of(network) is None:
        return settings
    name = SITES[WAN].layers.rpartition(".")[2]
    found: list[str] = []
    for target in settings.lora_targets:
        head, dot, tail = target.rpartition(f"{name}.")
        found += [f"{head}{name}.{half}.{tail}" for half in ("first", "second")] if dot else [target]
    return replace(settings, lora_targets=tuple(found))


def train_second_time(network: nn.Module) -> None:
    """Layers of a second time without adapters are trained as they are beside adapters, in fp32 at least."""
    layers = second_time_of(network)
    if layers is not None and not any(".lora_" in name for name, _ in layers.second.named_parameters()):
        layers.second.requires_grad_(True)
        if next(layers.second.parameters()).itemsize < torch.float32.itemsize:
            layers.second.float()


def check_causal_map(network: WanTransformer3DModel) -> None:
    """Raise ValueError for a network that would have no export as a flow map: before it is trained, not after."""
    check_anyflow_parts(network)
    config = network.config
    if config["in_channels"] != config["out_channels"] or tuple(config["patch_size"]) != (1, 2, 2):
        raise ValueError(
            f"student.second_time is for networks of latents and text alone with patches of 2 x 2, which diffusers' "
            f"causal class takes: this one takes {config['in_channels']} channels for {config['out_channels']}, in "
            f"patches of {tuple(config['patch_size'])}"
        )


def holds_two_times(weights: StoredWeights) -> bool:
    """Whether these are weights of a Wan of two times. Raises ValueError when they cannot be read."""
    return any(name.startswith(f"{SITES[WAN].layers}.second.") for name in weights.names())


def load_stage(network: WanTransformer3DModel, weights: StoredWeights, second_time: SecondTime) -> None:
    """Load the weights of a stage before; those of two times bring their layers with them.

    Raises:
        ValueError: they do not fit, or have a second time of another kind than the run.
    """
    if holds_two_times(weights):
        # Both kinds have layers of the same names and sizes, so that their weights would fit and mean another network.
        stated = weights.stated("second_time")
        if second_time == "none" or stated not in (None, second_time):
            raise ValueError(
                f"{weights.key} {weights.source} holds a network whose second time is "
                f"{'gate or sum' if stated is None else stated!r}, and student.second_time is {second_time!r}: set it "
                "to the same (tf_meanflow, tf_anyflow, self_forcing), or give weights of one time"
            )
        add_second_time(network, second_time)
    load_transformer(network, weights)


def with_channels(
    network: WanTransformer3DModel, controls: int, place: Literal["channels", "layers"]
) -> WanTransformer3DModel:
    """The network with K controls of each frame, in channels of its input (a copy) or in its layers (in place).

    At first it is the same function. Raises ValueError as `widened`.
    """
    if place == "channels":
        return widened(network, controls)
    add_features(network, controls).train(network.training)
    return network


class LayerSteeredFamily(WanFamily):
    """A bidirectional Wan network that is told the controls of the condition in its layers."""

    def velocity(self, network: WanTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `WanFamily.velocity`. Raises ValueError for a condition without controls."""
        extra = controls_of(condition, x_t.shape[2])
        if extra is None:
            raise ValueError("a steered teacher was called without controls: give them with `with_controls`")
        dtype = torch.promote_types(t.dtype, torch.float32)
        return CausalWan(network).bidirectional(x_t, t.to(dtype), condition.text, extra=extra).to(x_t.dtype)


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


def check_names(weights: StoredWeights, names: tuple[str, ...]) -> None:
    """Raise ValueError where the run or export that holds the weights says that they know other controls than these."""
    # The file is in a checkpoint of a run, in the transformer of an export, or stands alone.
    holding = [folder for folder in weights.files[0].resolve().parents[:2] if (folder / FILE_NAME).is_file()]
    known = load_defaults(holding[0]).actions if holding else names
    if known != names:
        raise ValueError(
            f"{weights.key} {weights.source} knows the controls {list(known)}, and data.controls has {list(names)}: a "
            "stage goes on with the controls of the one before, in their order"
        )


def load_transformer(network: WanTransformer3DModel, weights: StoredWeights) -> None:
    """`load_weights` into a Wan transformer, with its own message for another number of control channels.

    Raises ValueError as `load_weights`.
    """
    stored, own = stored_channels(weights), network.state_dict()[PATCHES].shape[1]
    if stored is not None and stored != own:
        latent = network.config["out_channels"]
        raise ValueError(
            f"{weights.key} {weights.source} takes {stored - latent} control channels beside {latent} of latents, and "
            f"this run has {own - latent}: give data.controls with the channels that these weights were trained with, "
            "or weights that fit"
        )
    load_weights(network, weights)


def stored_channels(weights: StoredWeights) -> int | None:
    """Input channels of stored weights, read without the weights; None where they have no input layer of Wan.

    Raises ValueError for a file that cannot be read.
    """
    if PATCHES not in weights.names():
        return None
    for path in weights.files:
        with safe_open(path, framework="pt") as file:
            names = [name for name in list(file.keys()) if name.endswith(PATCHES)]
            shape = file.get_slice(names[0]).get_shape() if names else []
        if len(shape) > 1:
            return shape[1]
    return None


def steer_teacher(
    teacher: Teacher, weights: StoredWeights, controls: int, place: Literal["channels", "layers"]
) -> None:
    """Give a teacher K controls of each frame and the weights of a bidirectional network that knows them.

    Its denoiser, and every copy of it such as the fake score, then needs a condition with controls. The pipeline keeps
    the network that it was loaded with. Raises ValueError for weights that do not fit.
    """
    network, family = teacher.denoiser.network, teacher.family
    assert isinstance(network, WanTransformer3DModel)
    assert isinstance(family, WanFamily)
    if place == "layers":
        copied = teacher.denoiser.copy().network
        assert isinstance(copied, WanTransformer3DModel)
        network = copied
    wide = with_channels(network, controls, place)
    load_transformer(wide, weights)
    wide.requires_grad_(False).eval()
    steered = SteeredWanFamily if place == "channels" else LayerSteeredFamily
    teacher.family = steered(family.time_scale, family.text_tokens, family.time_per_token)
    teacher.denoiser = Denoiser(wide, teacher.family)
