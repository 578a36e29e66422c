"""Low-rank adapters on a diffusers network, through peft (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

ADAPTER = "default"


@runtime_checkable
class AdapterNetwork(Protocol):
    """The adapter methods of a diffusers model."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = ...) -> None: ...

    def fuse_lora(self, lora_scale: float = ..., safe_fusing: bool = ..., adapter_names: Any = ...) -> None: ...

    def unload_lora(self) -> None: ...


def add_lora(
    network: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    start: Literal["uniform", "gaussian"] = "uniform",
) -> None:
    """Freeze a diffusers network and add trainable adapters W + (alpha / rank) B A to its target layers, in place.

    The output does not change, since B starts at zero. A is drawn from `seed` alone: every process gets the same
    adapters and the global generator is not touched. Adapters are fp32 whatever the network is.

    Args:
        network: a diffusers model without adapters.
        rank: inner width, at least 1.
        alpha: the update is scaled by alpha / rank; positive.
        targets: names of layers, or ends of their dotted names, such as "to_q" or "attn.to_out.0".
        seed: decides A.
        start: A is uniform with the bound 1 / sqrt(fan_in), or normal with the standard deviation 1 / rank (what peft
            calls gaussian, and RTDMD trains).

    Raises:
        ValueError: the network takes no adapters or has some, an argument is out of range, or a target has no layer.
    """
    if not isinstance(network, AdapterNetwork) and not isinstance(network, ModelMixin):
        raise ValueError(f"{type(network).__name__} has no add_adapter: LoRA needs a diffusers model")
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA needs rank >= 1 and alpha > 0, got rank={rank}, alpha={alpha}")
    if lora_layers(network):
        raise ValueError("the network has adapters already: merge them first with merge_lora")
    names = [name for name, _ in network.named_modules()]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unmatched or not targets:
        raise ValueError(f"LoRA targets {unmatched or list(targets)} match no layer of {type(network).__name__}")
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ends = tuple(f".{target}" for target in targets)
    others = [
        name for name, layer in network.named_modules() if f".{name}".endswith(ends) and not isinstance(layer, kinds)
    ]
    if others:
        raise ValueError(f"LoRA targets {list(targets)} name {others[0]}, which is no linear layer or convolution")
    network.requires_grad_(False)
    # peft initialises from the global generator before the weights are set below.
    with torch.random.fork_rng(devices=[]):
        # peft annotates lora_alpha as int and divides it by the rank as a number.
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[*targets])  # pyright: ignore[reportArgumentType]
        if isinstance(network, AdapterNetwork):
            network.add_adapter(config, ADAPTER)
        else:
            # PixArt and DiT are no adapter networks of diffusers; peft puts adapters into any.
            inject_adapter_in_model(config, network, ADAPTER)
            network.peft_config = {ADAPTER: config}  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(seed)
    for name in lora_layers(network):
        _initialise(network.get_submodule(name), generator, start, rank)


def merge_lora(network: nn.Module) -> None:
    """Add the adapters to the weights they sit on and remove them, in place; names and classes are as before again.

    The weights stay frozen as `add_lora` left them. A network on shared weights is copied first: see
    `shared_weights.beside`.

    Raises:
        ValueError: the network has no adapters, or merging would make a weight not finite.
    """
    names = lora_layers(network)
    if not names:
        raise ValueError("the network has no LoRA adapters to merge")
    if isinstance(network, AdapterNetwork):
        network.fuse_lora(safe_fusing=True)
        network.unload_lora()
        return
    for name in names:
        layer: Any = network.get_submodule(name)
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config


def merge_lora_file(pipeline: Any, source: str, *, scale: float) -> None:
    """Add a stored LoRA to the weights of a pipeline's denoising network, in place. Raises ValueError as
    `add_lora_file`."""
    name = next(name for name in ("transformer", "unet") if getattr(pipeline, name, None) is not None)
    network = getattr(pipeline, name)
    add_lora_file(pipeline, network, source, scale=1.0)
    network.fuse_lora(lora_scale=scale, safe_fusing=True)
    network.unload_lora()


def add_lora_file(pipeline: Any, network: Any, source: str, *, scale: float) -> None:
    """Give a pipeline's denoising network, or another on the same weights, a stored LoRA as adapters, in place;
    safetensors alone.

    Raises:
        ValueError: it cannot be read, is of another network, or changes text encoders, which stay the teacher's own.
    """
    try:
        found = pipeline.lora_state_dict(source, use_safetensors=True, return_lora_metadata=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"teacher.lora {source} cannot be read ({error}); give a LoRA as .safetensors") from error
    # U-Nets give the scales of kohya's layout between the weights and the rank and scale of diffusers' own.
    state, alphas, metadata = found if len(found) == 3 else (found[0], None, found[1])
    text = [name for name in state if name.startswith("text_encoder")]
    if text:
        raise ValueError(
            f"teacher.lora {source} changes {len(text)} weights of the text encoders {text[:2]}, and students have the "
            "teacher's own: give a LoRA of the denoising network alone"
        )
    name = next(name for name in ("transformer", "unet") if getattr(pipeline, name, None) is not None)
    with torch.random.fork_rng(devices=[]):
        try:
            network.load_lora_adapter(
                state, prefix=name, network_alphas=alphas, metadata=metadata, adapter_name="teacher"
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"teacher.lora {source} does not fit the {name} of the teacher: {error}") from error
    if not lora_layers(network):
        raise ValueError(f"teacher.lora {source} has no weights for the {name} of the teacher: is it of another model?")
    if scale != 1.0:
        network.set_adapters("teacher", scale)


def lora_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The adapter weights, `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank].

    diffusers' `save_lora_weights` takes this. The scale alpha / rank is not in it.

    Raises:
        ValueError: the network has no adapters.
    """
    if not lora_layers(network):
        raise ValueError("the network has no LoRA adapters")
    return get_peft_model_state_dict(network, adapter_name=ADAPTER)


def matching_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of all linear layers and convolutions, those under adapters included."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    adapters = (".lora_A.", ".lora_B.")
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, kinds) and not any(part in name for part in adapters)
    ]
    return tuple(dict.fromkeys(name.removesuffix(".base_layer") for name in names))


def lora_layers(network: nn.Module) -> list[str]:
    """Names of the layers with adapters."""
    return sorted(name for name, module in network.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _initialise(layer: nn.Module, generator: torch.Generator, start: str, rank: int) -> None:
    down = layer.get_submodule(f"lora_A.{ADAPTER}").float().get_parameter("weight")
    up = layer.get_submodule(f"lora_B.{ADAPTER}").float().get_parameter("weight")
    drawn = torch.empty(down.shape)
    if start == "gaussian":
        down.copy_(drawn.normal_(0, 1 / rank, generator=generator))
    else:
        bound = 1 / math.sqrt(down[0].numel())
        down.copy_(drawn.uniform_(-bound, bound, generator=generator))
    up.zero_()
