"""Networks that are made of the same tensors: a trained one on frozen weights of another, and one that never learns.

Each has modules of its own, with hooks, attention processors, adapters and recomputation of its own; what they share
are parameters and buffers. So there is nothing to switch between the roles of one base, and nothing that a backward
pass could find switched otherwise than its forward pass left it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def beside(network: ModuleT) -> ModuleT:
    """Another network on the same frozen weights and buffers, with copies of the weights that are trained.

    Of a network that is frozen as a whole it is that network again, at no cost of memory: adapters that are added to
    it are its own. Never load, merge or convert weights in it in place; copy it first.
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    shared |= {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
    return copy.deepcopy(network, shared)


def averaged_twin(network: ModuleT, average: Mapping[str, Tensor]) -> ModuleT:
    """A network whose trained weights are these averages by name, in their own memory, so that it follows them.

    It takes no gradient; all other weights and the buffers that are not averaged are shared with `network`.
    """
    shared: dict[int, Any] = {id(buffer): average.get(name, buffer) for name, buffer in network.named_buffers()}
    for name, weight in network.named_parameters():
        shared[id(weight)] = nn.Parameter(average.get(name, weight.detach()), requires_grad=False)
    return copy.deepcopy(network, shared)


def frozen_twin(network: ModuleT) -> ModuleT:
    """A network with the live weights of this one, in the same memory, that takes no gradient.

    It follows every change in place: optimizer steps, averages that are applied, loaded checkpoints. Gradients pass
    through it to its inputs, also where blocks are computed again in the backward pass, which a freeze that ends with
    the forward pass would not survive. Make it when the network is where it stays (device and dtype).
    """
    shared: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    shared |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, shared)
