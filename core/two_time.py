"""A second time for a diffusers network: u(x_t, t, r), the average velocity from t down to r.

The network stays what it is. The layers that embed its time are wrapped in `TwoTimeLayers`, and the network is called
with both times stacked along the batch, [2 B] or [2 B, ...], which only these layers see. So nothing is kept between
calls, and forward mode, distributed wrappers, EMA, checkpoints and adapters work as they do without a second time.

    gate       (1 - g) E(t) + g E_r(r), E_r a copy of E, g = 1/4    AnyFlow (arXiv:2605.13724, its public code)
    sum        E(t) + E_d(t - r), E_d a copy of E whose last layer is zero      MeanFlow (arXiv:2505.13447)
    decoupled  E(t) for the first two thirds of the blocks, E(r) for the rest   decoupled MeanFlow, no new weights

With any of them u(x, t, t) is the teacher's velocity before training, with "sum" u(x, t, r) is for every r. That E_d
starts as a zero function and that the last norm of "decoupled" sees r are our reading.

Legend: B batch; t, r [B] or [B, F], in the same units; D width of the embedding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SecondTime = Literal["gate", "sum", "decoupled"]
GATE = 0.25
# Share of the blocks that see t in "decoupled".
FIRST_SHARE = 2 / 3


@dataclass(frozen=True)
class TimeSite:
    """Names of the two modules that embed a network's time: its sinusoids, and the layers after them."""

    sinusoids: str
    layers: str


# How diffusers' AnyFlow classes hold two times, (1 - g) E(t) + g E_r(d): "gate" has d = r and g = GATE; "sum" has
# d = t - r, g = 1/2, and the last layers of both embeddings doubled, which loses no bit.
SUM_GATE, SUM_SCALE = 0.5, 2.0
DELTA_KINDS = {(GATE, "r"): "gate", (SUM_GATE, "t-r"): "sum", (0.0, "r"): "none"}
# By the name of the network's class. The layers are two linear ones with an activation between them.
SITES = {
    "SD3Transformer2DModel": TimeSite("time_text_embed.time_proj", "time_text_embed.timestep_embedder"),
    "WanTransformer3DModel": TimeSite("condition_embedder.timesteps_proj", "condition_embedder.time_embedder"),
}
# Networks whose blocks can see different embeddings.
DECOUPLED = ("SD3Transformer2DModel",)


class TwoTimeLayers(nn.Module):
    """Time layers of a network that is told two times: sinusoids [2 B, ..., N] of both give the embedding [B, ..., D].

    With "decoupled" both embeddings come back, [2 B, ..., D], for the blocks to choose from.

    Args:
        layers: the network's own time layers.
        kind: see the module.
    """

    def __init__(self, layers: nn.Module, kind: SecondTime) -> None:
        super().__init__()
        self.kind: SecondTime = kind
        self.first = layers
        if kind == "decoupled":
            return
        self.second = copy.deepcopy(layers)
        # Layers with adapters stay as they are: their copies have adapters of their own on a frozen copy.
        if not any(".lora_" in name for name, _ in layers.named_parameters()):
            self.second.requires_grad_(True)
            # Trained weights, where the network's own may be frozen in half precision.
            if next(layers.parameters()).dtype in (torch.float16, torch.bfloat16):
                self.second.float()
        if kind == "sum":
            last = self.second.get_submodule("linear_2")
            for name, parameter in last.named_parameters():
                # Zeros in both factors of an adapter would stay zeros.
                if "lora_A." not in name:
                    nn.init.zeros_(parameter)

    def forward(self, sinusoids: Tensor) -> Tensor:
        if self.kind == "decoupled":
            return self.first(sinusoids)
        at_first, at_second = sinusoids.chunk(2)
        wide = next(self.second.parameters()).dtype
        first = self.first(at_first)
        second = self.second(at_second.to(wide)).to(first.dtype)
        return (1 - GATE) * first + GATE * second if self.kind == "gate" else first + second

    def second_input(self, t: Tensor, r: Tensor) -> Tensor:
        """What the second half of the stacked times is: r, or t - r for "sum"."""
        return t - r if self.kind == "sum" else r


def add_second_time(network: nn.Module, kind: SecondTime) -> None:
    """Let a network take a second time, in place; the new layers, if any, are trainable.

    Where the layers of its time have adapters, so have the new ones, which are frozen beside them.

    Args:
        network: a diffusers network, with or without adapters (adapters first: adding them freezes what is there).
        kind: see the module.

    Raises:
        ValueError: the kind is unknown, the network's class is, or it has a second time already.
    """
    name = type(network).__name__
    if kind not in get_args(SecondTime):
        raise ValueError(f"second_time {kind!r} is unknown; choose {', '.join(get_args(SecondTime))}")
    known = DECOUPLED if kind == "decoupled" else tuple(SITES)
    if name not in known:
        raise ValueError(f"second_time {kind!r} is not known for {name}, only for {', '.join(known)}")
    if second_time_of(network) is not None:
        raise ValueError(f"this {name} has a second time already")
    parent, _, child = SITES[name].layers.rpartition(".")
    holder = network.get_submodule(parent)
    setattr(holder, child, TwoTimeLayers(holder.get_submodule(child), kind))
    if kind == "decoupled":
        _decouple(network)


def second_time_of(network: nn.Module) -> TwoTimeLayers | None:
    """The network's layers of two times, None where it has one time."""
    site = SITES.get(type(network).__name__)
    layers = None if site is None else network.get_submodule(site.layers)
    return layers if isinstance(layers, TwoTimeLayers) else None


def holds_second_time(path: str | Path) -> bool:
    """Whether a safetensors file has the weights of two-time layers. Raises ValueError when it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = tuple(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); give a .safetensors file of network weights") from error
    return any(f"{site.layers}.first." in name for name in names for site in SITES.values())


def network_times(network: nn.Module, t: Tensor, r: Tensor | None) -> Tensor:
    """What a network is called with: t itself, or both times stacked along the batch; r None is r = t.

    Raises:
        ValueError: r is given to a network of one time, or its shape is not that of t.
    """
    layers = second_time_of(network)
    if layers is None:
        if r is not None:
            raise ValueError(
                f"this {type(network).__name__} has one time and is given r: set second_time to 'gate', 'sum' or "
                "'decoupled' (in the method's section, for causal students under student), or call it without"
            )
        return t
    if r is not None and r.shape != t.shape:
        raise ValueError(f"r must have the shape {tuple(t.shape)} of t, got {tuple(r.shape)}")
    return torch.cat([t, layers.second_input(t, t if r is None else r)])


def _decouple(network: nn.Module) -> None:
    """Hooks of an SD3 network: text for both embeddings, and for each block the half that it sees."""
    network.get_submodule("time_text_embed").register_forward_pre_hook(_repeat_text)
    blocks = list(network.get_submodule("transformer_blocks").children())
    early = round(FIRST_SHARE * len(blocks))
    for place, block in enumerate(blocks):
        block.register_forward_pre_hook(_first_half if place < early else _second_half, with_kwargs=True)
    network.get_submodule("norm_out").register_forward_pre_hook(_second_half, with_kwargs=True)


def _repeat_text(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    times, text = inputs
    return times, text.repeat(2, 1)


def _first_half(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _with_half(inputs, named, 0)


def _second_half(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _with_half(inputs, named, 1)


def _with_half(inputs: tuple[Any, ...], named: dict[str, Any], half: int) -> tuple[Any, dict[str, Any]]:
    """The arguments with one half of the embedding: `temb` by name, third of a block's or last of the norm's."""
    if "temb" in named:
        return inputs, {**named, "temb": named["temb"].chunk(2)[half]}
    place = min(2, len(inputs) - 1)
    return (*inputs[:place], inputs[place].chunk(2)[half], *inputs[place + 1 :]), named
