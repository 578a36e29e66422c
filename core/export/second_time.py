"""A second time disappears at export: on a fixed grid it is a function of the step, so it goes into the first one.

Step k of K calls the network at t_k with r = t_(k+1). Its time embedding there is one known vector e_k, and stock time
layers W act(A s(t) + a) + b can be made to give it: the smallest change of (W, b) with

    W h_k + b = e_k,   h_k = act(A s(t_k) + a),   k = 1 ... K

is a least-squares problem in fp64 with exact solutions for K <= D + 1. All other weights stay, and an Euler step of the
stock pipeline is the jump x - (t_k - t_(k+1)) u(x, t_k, t_(k+1)).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.two_time import SITES, second_time_of

BAKE_TOLERANCE = 1e-6


@torch.no_grad()
def bake_second_time(network: nn.Module, timesteps: Sequence[float]) -> float:
    """Replace the two-time layers of a network by stock ones that are equal at these timesteps, in place.

    Args:
        network: with a second time and without adapters.
        timesteps: [K] what the pipeline calls its network with, strictly decreasing; the last step ends at 0.

    Returns:
        The largest error of an embedding, divided by the largest embedding, with weights in the network's dtype.

    Raises:
        ValueError: the network has one time, or is of kind "decoupled"; there are more steps than the layers are wide;
            or the error is above 1e-6.
    """
    layers = second_time_of(network)
    if layers is None:
        raise ValueError(f"this {type(network).__name__} has no second time to bake")
    if layers.kind == "decoupled":
        raise ValueError(
            "second_time 'decoupled' has no export: its early and late blocks see different embeddings, each mixed "
            "with the text behind an activation, and a stock network has one. Train with second_time 'gate' or 'sum' "
            "to export, or sample with fewstep itself"
        )
    site = SITES[type(network).__name__]
    stock: Any = copy.deepcopy(layers.first)
    weight = cast(Tensor, stock.linear_2.weight)
    if len(timesteps) > weight.shape[1]:
        raise ValueError(
            f"{len(timesteps)} steps do not fit into time layers of width {weight.shape[1]}: export fewer steps"
        )
    start = torch.tensor(timesteps, dtype=torch.float32, device=weight.device)
    sinusoids = network.get_submodule(site.sinusoids)
    second = layers.second_input(start, torch.cat([start[1:], start.new_zeros(1)]))
    first, both = sinusoids(start).double(), sinusoids(torch.cat([start, second])).double()
    wanted = copy.deepcopy(layers).double()(both)
    wide: Any = copy.deepcopy(stock).double()
    hidden = wide.act(wide.linear_1(first))
    features = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
    # gelsd gives the smallest of all solutions, and runs on the CPU.
    missing = (wanted - wide.linear_2(hidden)).cpu()
    change = torch.linalg.lstsq(features.cpu(), missing, driver="gelsd").solution.to(weight.device)
    weight.copy_(wide.linear_2.weight + change[:-1].T)
    stock.linear_2.bias.copy_(wide.linear_2.bias + change[-1])
    error = (copy.deepcopy(stock).double()(first) - wanted).abs().max() / wanted.abs().max()
    # The comparison is false for a nan.
    if not error.item() <= BAKE_TOLERANCE:
        raise ValueError(
            f"the second time does not fit into the time layers at timesteps {list(timesteps)}: error "
            f"{error.item():.1e} of the largest embedding, allowed {BAKE_TOLERANCE:.0e}. Steps that lie close together "
            "are the usual cause: export fewer, or with a smaller shift; weights below fp32 are baked before rounding"
        )
    parent, _, child = site.layers.rpartition(".")
    setattr(network.get_submodule(parent), child, stock)
    return error.item()
