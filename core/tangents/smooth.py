"""A network whose velocity is smooth in time: sinusoids of its time that turn too fast are faded out.

Networks that are told 1000 t see sinusoids that turn up to 1,000 radians from data to noise. What is trained at
scattered times does not learn their slope: the velocity along a path is a smooth function with a fine wiggle on it, and
a derivative follows the wiggle. The mean of a sinusoid cos(w t) over times from N(t, sigma^2) is

    E cos(w (t + sigma z)) = exp(-(w sigma)^2 / 2) cos(w t)

and the same for the sine, so that each channel is multiplied by a number of its own. The first layer after the
sinusoids is linear: the numbers go into its columns, and the network stays one of its class, with other weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from fewstep.core.two_time import TwoTimeLayers

# Names that diffusers has for the sinusoids of a time and for the layers after them; one guidance embedder more may
# stand beside these.
SINUSOIDS, LAYERS = ("time_proj", "timesteps_proj"), ("timestep_embedder", "time_embedder", "time_embedding")
# Columns that are faded to less than this stay as they are in training, which would bring the wiggle back.
KEPT = 0.5


def radians_per_time(sinusoids: Timesteps, time_scale: float) -> Tensor:
    """How many radians each channel [N] turns from t = 0 to t = 1; `time_scale` is the family's."""
    half = sinusoids.num_channels // 2
    exponents = torch.arange(half, dtype=torch.float64) / (half - sinusoids.downscale_freq_shift)
    # Networks that are told t itself have the thousandfold in their sinusoids, the others in their time.
    turns = time_scale * torch.exp(-math.log(10000) * exponents)
    return torch.cat([turns, turns])


def time_sites(network: nn.Module) -> list[tuple[Timesteps, TimestepEmbedding]]:
    """The places where a network embeds its time: sinusoids and the two layers after them."""
    found = []
    for module in network.modules():
        # Wan has a linear layer by one of these names beside its sinusoids.
        sinusoids = [one for name in SINUSOIDS if isinstance(one := getattr(module, name, None), Timesteps)]
        named = [getattr(module, name, None) for name in LAYERS]
        # A second time has layers of its own after the same sinusoids.
        pairs = [(one.first, getattr(one, "second", None)) for one in named if isinstance(one, TwoTimeLayers)]
        layers = [
            one for one in (*named, *(half for pair in pairs for half in pair)) if isinstance(one, TimestepEmbedding)
        ]
        if sinusoids and pairs:
            found += [(sinusoids[0], each) for each in layers]
        elif sinusoids and layers:
            found.append((sinusoids[0], layers[0]))
    return found


@torch.no_grad()
def smooth_time(network: nn.Module, sigma: float, *, time_scale: float, already: float = 0.0) -> None:
    """Fade the sinusoids of a network's time as their mean over N(t, sigma^2) does, in place, for good.

    Trained weights of columns that are faded to less than a half get no gradient from now on.

    Args:
        network: a diffusers network, before adapters are added; of a second time all layers are smoothed.
        sigma: in canonical time; 0.01 fades 118 radians to a half. 0 changes nothing.
        time_scale: the family's, see `radians_per_time`.
        already: the sigma that is in the weights; variances add up.

    Raises:
        ValueError: sigma is negative or not finite, or the network's time has no sinusoids that are known here.
    """
    if not (math.isfinite(sigma) and sigma >= 0 and already >= 0):
        raise ValueError(f"time_smoothing is {sigma}, over {already}; it must be 0 or more, such as 0.01")
    if sigma == 0:
        return
    sites = time_sites(network)
    if not sites:
        raise ValueError(
            f"time_smoothing is {sigma}, and {type(network).__name__} embeds its time in a way that is not known here: "
            "leave it out, or take tangent 'central' with a central_step of 0.02"
        )
    missing = math.sqrt(max(sigma**2 - already**2, 0.0))
    for sinusoids, layers in sites:
        first: Any = layers.linear_1
        turns = radians_per_time(sinusoids, time_scale).to(first.weight.device)
        first.weight.mul_(fading(turns, missing).to(first.weight.dtype))
        kept = fading(turns, sigma) >= KEPT
        if first.weight.requires_grad:
            # In the dtype of the gradient, which a role may train in half precision after this.
            first.weight.register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient))


def fading(turns: Tensor, sigma: float) -> Tensor:
    """exp(-(w sigma)^2 / 2) for w radians in a unit of time."""
    return torch.exp(-((turns * sigma) ** 2) / 2)
