"""Tiny autoencoders, whose decoder is cheap enough for a loss on pixels (AutoencoderTiny)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor


def tiny_decoder(path: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Pixels in [0, 1] by a tiny autoencoder (AutoencoderTiny, such as madebyollin/taesdxl), in fp32.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        found: Any = AutoencoderTiny.from_pretrained(path, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"pairs.autoencoder {path} cannot be read: {error}") from error
    network = found.to(device).eval().requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        return network.decode(latents / network.config.scaling_factor).sample * 0.5 + 0.5

    return decode
