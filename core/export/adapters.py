"""The adapters of an export as files that stock diffusers loads, one for each network of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewstep.core.export.comfyui import write_comfyui
from fewstep.core.networks.lora import ADAPTER, lora_state_dict
from fewstep.core.teacher import Teacher
from fewstep.core.weights import LORA_FILES


def write_adapters(teacher: Teacher, stored: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the adapters of a network into a folder, and where ComfyUI knows the model, a file for it."""
    config, parts = stored.peft_config[ADAPTER], teacher.family.parts(stored)
    metadata = config.to_dict() | {"base_model_name_or_path": None}
    pipeline: Any = teacher.pipeline
    for number, (name, part) in enumerate(parts.items()):
        state = lora_state_dict(part)
        # The loader of diffusers puts each file on one network, and knows them all by the first one's name.
        first = name if number == 0 else "transformer"
        pipeline.save_lora_weights(
            folder,
            weight_name=LORA_FILES[number],
            safe_serialization=True,
            **{
                f"{first}_lora_layers": {key: tensor.to(dtype).contiguous() for key, tensor in state.items()},
                f"{first}_lora_adapter_metadata": metadata,
            },
        )
        if len(parts) == 1:
            write_comfyui(state, folder, family=teacher.family.name, scale=config.lora_alpha / config.r, dtype=dtype)


def load_adapter_files(pipeline: Any, folder: str | Path) -> None:
    """Put the adapters of an export on a stock pipeline."""
    pipeline.load_lora_weights(folder, weight_name=LORA_FILES[0])
    if (Path(folder) / LORA_FILES[1]).is_file():
        pipeline.load_lora_weights(folder, weight_name=LORA_FILES[1], load_into_transformer_2=True)
