"""Adapters in the names that ComfyUI knows, beside those of diffusers; stock diffusers reads them, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = "comfyui"
# Layers of Wan as its own code names them, by the ends of diffusers' names.
WAN = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
WAN_BLOCKS = {"attn1": "self_attn", "attn2": "cross_attn"}


def write_comfyui(state: Mapping[str, Tensor], folder: Path, *, family: str, scale: float, dtype: torch.dtype) -> bool:
    """Write the adapters for ComfyUI, where it knows the model and every layer; whether it did.

    Args:
        state: `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank], as `lora_state_dict` gives.
        folder: of the export; the file is comfyui/lora.safetensors in it.
        family: name of the family.
        scale: alpha / rank, which goes into the second matrix, so that readers that know no alpha are right.
        dtype: of the file.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, part = name.partition(".lora_")
        renamed = layer_name(layer, family)
        if renamed is None:
            return False
        is_down = part.startswith("A")
        suffix = {"unet": ("lora_down", "lora_up")}.get(family, ("lora_A", "lora_B"))[0 if is_down else 1]
        value = tensor if is_down else tensor * scale
        tensors[f"{renamed}.{suffix}.weight"] = value.to(dtype).contiguous()
        if family == "unet" and is_down:
            tensors[f"{renamed}.alpha"] = torch.tensor(float(len(tensor)), dtype=dtype)
    (folder / FOLDER).mkdir()
    save_file(tensors, folder / FOLDER / "lora.safetensors", metadata={"format": "pt"})
    return True


def layer_name(layer: str, family: str) -> str | None:
    """A layer's name in ComfyUI, None where it has none.

    U-Nets have kohya's names, Stable Diffusion 3 diffusers' own, Wan those of its own code.
    """
    if family == "unet":
        return f"lora_unet_{layer.replace('.', '_')}"
    if family == "sd3":
        return f"transformer.{layer}"
    if family != "wan":
        return None
    for end, renamed in WAN.items():
        if layer.endswith(f".{end}"):
            head = layer.removesuffix(f".{end}")
            for theirs, own in WAN_BLOCKS.items():
                head = head.replace(f".{theirs}", f".{own}")
            return f"diffusion_model.{head}.{renamed}"
    return None
