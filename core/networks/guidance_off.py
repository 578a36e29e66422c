"""U-Nets whose stock pipelines leave guidance out, whatever guidance they are called with.

Pipelines of Stable Diffusion and SDXL make a second network call only for networks without an embedding of the
guidance scale. One of zero weights switches the call off and changes nothing else. Within this package a U-Net never
has it: it is added by an export, and dropped again wherever a network or its weights are read (`load_weights`, too).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fewstep.core.weights import IDLE_EMBEDDING

# As wide as that of LCM's U-Nets.
EMBEDDING_WIDTH = 256


def with_guidance_off(network: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy with an embedding of the guidance of zero weights; a network that has one already is given back."""
    config: Any = network.config
    if config["time_cond_proj_dim"] is not None:
        return network
    made: Any = type(network).from_config(config, time_cond_proj_dim=EMBEDDING_WIDTH)
    state = network.state_dict()
    weight = made.state_dict()[IDLE_EMBEDDING]
    made.load_state_dict({**state, IDLE_EMBEDDING: torch.zeros_like(weight)})
    first = next(network.parameters())
    return made.to(device=first.device, dtype=first.dtype).train(network.training)


def drop_guidance_off(network: nn.Module) -> None:
    """Take such an embedding out again, in place; other networks, and weights that are not zero, stay."""
    if not isinstance(network, UNet2DConditionModel):
        return
    projection = network.time_embedding.cond_proj
    if projection is None or bool(projection.weight.any()):
        return
    network.time_embedding.cond_proj = None
    network.register_to_config(time_cond_proj_dim=None)
