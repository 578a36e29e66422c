"""A network's weights as its authors name them, in one file: what ComfyUI and `from_single_file` read.

U-Nets go back to the names of latent diffusion, Stable Diffusion 3 and Wan to those of their own code. Each is the way
back of a conversion in diffusers (loaders/single_file_utils.py), which is asked to undo it before a file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from torch import Tensor, nn

from fewstep.core.export.comfyui import WAN, WAN_BLOCKS

State = dict[str, Tensor]
# Of every single file; the text encoders and the autoencoder of a whole checkpoint have others.
PREFIX = "model.diffusion_model."

SD3_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
# Three layers that the original has as one.
SD3_JOINED = {
    "attn.{}": ("x_block.attn.qkv", ("to_q", "to_k", "to_v")),
    "attn.{}_proj": ("context_block.attn.qkv", ("add_q", "add_k", "add_v")),
    "attn2.{}": ("x_block.attn2.qkv", ("to_q", "to_k", "to_v")),
}
JOINED = {
    pattern.format(part): (whole, place)
    for pattern, (whole, parts) in SD3_JOINED.items()
    for place, part in enumerate(parts)
}
WAN_TOP = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_state(network: nn.Module, family: str) -> State | None:
    """All weights of a plain network by their original names with `PREFIX`, None for a family that has none.

    Raises ValueError for a network that diffusers does not read back bit for bit, such as one with layers of its own.
    """
    if family not in _WAYS:
        return None
    config: Any = network.config
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    # Guidance that has no effect is of diffusers alone.
    state = {name: tensor for name, tensor in state.items() if not name.startswith("time_embedding.cond_proj")}
    there, back = _WAYS[family]
    found = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in there(state, config).items()}
    read = back(dict(found), config=config)
    different = [name for name in state.keys() | read.keys() if not _same(state.get(name), read.get(name))]
    if different:
        raise ValueError(
            f"{type(network).__name__} has {len(different)} weights that its original form has not, {different[0]} for "
            "one: it has no single file"
        )
    return found


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and torch.equal(first, second)


def _sd3(state: Mapping[str, Tensor], config: Any) -> State:
    found: State = {}
    joined: dict[str, dict[int, Tensor]] = {}
    last = config["num_layers"] - 1
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if not name.startswith("transformer_blocks."):
            top = SD3_TOP.get(name) or f"{SD3_TOP[layer]}.{kind}"
            found[top] = _swapped(tensor) if layer == "norm_out.linear" else tensor
            continue
        _, number, rest = layer.split(".", 2)
        block = f"joint_blocks.{number}"
        if rest in JOINED:
            whole, place = JOINED[rest]
            joined.setdefault(f"{block}.{whole}.{kind}", {})[place] = tensor
            continue
        is_last_context = rest == "norm1_context.linear" and int(number) == last
        found[f"{block}.{SD3_BLOCK[rest]}.{kind}"] = _swapped(tensor) if is_last_context else tensor
    return found | {name: torch.cat([parts[place] for place in range(3)]) for name, parts in joined.items()}


def _swapped(tensor: Tensor) -> Tensor:
    """diffusers has scale before shift in layers that have no gate."""
    return torch.cat(list(reversed(tensor.chunk(2))))


def _wan(state: Mapping[str, Tensor], config: Any) -> State:
    del config
    found: State = {}
    for name, tensor in state.items():
        if name == "scale_shift_table":
            found["head.modulation"] = tensor
            continue
        layer, _, kind = name.rpartition(".")
        if layer in WAN_TOP:
            found[f"{WAN_TOP[layer]}.{kind}"] = tensor
            continue
        renamed = name.replace(".scale_shift_table", ".modulation")
        for ours, theirs in {**WAN_BLOCKS, **WAN}.items():
            renamed = renamed.replace(f".{ours}.", f".{theirs}.")
        # Two norms have changed their numbers.
        renamed = renamed.replace(".norm2.", ".norm*.").replace(".norm3.", ".norm2.").replace(".norm*.", ".norm3.")
        found[renamed] = tensor
    return found


def _unet(state: Mapping[str, Tensor], config: Any) -> State:
    per_block = config["layers_per_block"]
    levels = len(config["block_out_channels"])
    places: dict[str, str] = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    places["mid_block.attentions.0"] = "middle_block.1"
    for level in range(levels):
        for layer in range(per_block):
            number = 1 + level * (per_block + 1) + layer
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (per_block + 1)}.0.op"
        for layer in range(per_block + 1):
            number = level * (per_block + 1) + layer
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
        # After the attention, where the last layer of the block has one.
        has_attention = any(name.startswith(f"up_blocks.{level}.attentions.") for name in state)
        last = (level + 1) * (per_block + 1) - 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if has_attention else 1}.conv"
    found: State = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in UNET_TOP:
            found[f"{UNET_TOP[layer]}.{kind}"] = tensor
            continue
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            # Told by the comparison, with the layer's name.
            found[name] = tensor
            continue
        rest = name.removeprefix(f"{place}.")
        if ".resnets." in place:
            inner, _, kind = rest.rpartition(".")
            rest = f"{UNET_RESNET[inner]}.{kind}"
        found[f"{places[place]}.{rest}"] = tensor
    return found


def _unet_back(state: State, *, config: Any) -> State:
    return convert_ldm_unet_checkpoint(state, dict(config))


def _sd3_back(state: State, *, config: Any) -> State:
    del config
    return convert_sd3_transformer_checkpoint_to_diffusers(state)


def _wan_back(state: State, *, config: Any) -> State:
    del config
    return convert_wan_transformer_to_diffusers(state)


_WAYS: dict[str, tuple[Callable[[Mapping[str, Tensor], Any], State], Callable[..., State]]] = {
    "unet": (_unet, _unet_back),
    "sd3": (_sd3, _sd3_back),
    "wan": (_wan, _wan_back),
}
