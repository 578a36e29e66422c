"""SANA transformers changed for SANA-Sprint (arXiv:2503.09641): dense time, normalised queries and keys, guidance.

Each function returns a new stock network with the weights of the given one, which is not changed.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

QK_NORM = "rms_norm_across_heads"
# A SANA network has its time embedding at one place without guidance and at another with it.
PLAIN_EMBEDDER, GUIDED_EMBEDDER = "time_embed.emb.timestep_embedder.", "time_embed.timestep_embedder."


def with_dense_time(network: SanaTransformer2DModel, *, train_timesteps: int = 1000) -> SanaTransformer2DModel:
    """A network that the stock pipeline calls at t in [0, 1] and not at `train_timesteps` t.

    That divides the derivative in time, and with it the tangent of consistency training, by as much. It is another
    function of t: the network has to be fine-tuned (paper: 5,000 steps together with `with_qk_norm`).

    Raises:
        ValueError: the network has dense time already.
    """
    scale = network.config["timestep_scale"]
    if scale * train_timesteps <= 1:
        raise ValueError(f"the network's timestep_scale is {scale}: its time is dense already")
    return _rebuilt(network, timestep_scale=scale / train_timesteps)


def with_qk_norm(network: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A network whose queries and keys pass an RMS norm over all heads, with weights of one.

    It is another function: the network has to be fine-tuned.

    Raises:
        ValueError: the network has norms already.
    """
    if network.config["qk_norm"] is not None:
        raise ValueError(f"the network has the norm {network.config['qk_norm']} of queries and keys already")
    return _rebuilt(network, qk_norm=QK_NORM)


def with_guidance_embedding(network: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A network that is told the guidance scale, times `guidance_embeds_scale` 0.1, beside the time.

    The last layer of the new embedding is zero: at first the network is the given one whatever the scale is.

    Raises:
        ValueError: the network has the embedding already.
    """
    if network.config["guidance_embeds"]:
        raise ValueError("the network has a guidance embedding already")
    guided = _rebuilt(network, guidance_embeds=True)
    embedding: Any = guided.time_embed
    for parameter in embedding.guidance_embedder.linear_2.parameters():
        nn.init.zeros_(parameter)
    return guided


def _rebuilt(network: SanaTransformer2DModel, **changes: Any) -> SanaTransformer2DModel:
    """A stock network of the changed configuration with every weight that both have; the others are as initialised."""
    # Random weights that are replaced anyway leave the caller's random numbers as they were.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # A private entry makes from_config forget values that were defaults once.
        settings = {name: value for name, value in network.config.items() if not name.startswith("_")}
        rebuilt: Any = SanaTransformer2DModel.from_config({**settings, **changes})
    weights: dict[str, Tensor] = network.state_dict()
    if rebuilt.config["guidance_embeds"] and not network.config["guidance_embeds"]:
        weights = {name.replace(PLAIN_EMBEDDER, GUIDED_EMBEDDER): tensor for name, tensor in weights.items()}
    missing, unexpected = rebuilt.load_state_dict(weights, strict=False)
    new = [name for name in missing if not name.startswith("time_embed.guidance_embedder.") and ".norm_" not in name]
    assert not new, f"weights {new} have no counterpart"
    assert not unexpected, f"weights {unexpected} have no place"
    parameter = next(network.parameters())
    if parameter.dtype != torch.float32:
        rebuilt = rebuilt.to(dtype=parameter.dtype)
    return rebuilt.to(device=parameter.device).train(network.training)
