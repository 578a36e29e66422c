"""A frozen network whose layers keep their weights in 8 bits, under adapters (torchao, weights alone)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

Quantisation: TypeAlias = Literal["none", "int8", "float8"]


def quantise(network: nn.Module, kind: Quantisation) -> None:
    """Round the linear layers of a network's blocks to 8 bits with a scale for each row, in place.

    Embeddings of time and text, norms and the output stay as they are. Calls compute in the network's dtype.

    Raises:
        ValueError: torchao is not installed.
    """
    if kind == "none":
        return
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"teacher.quantise is {kind}, and torchao is not installed ({error}): pip install torchao, or leave it out"
        ) from error
    config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
    quantize_(network, config, filter_fn=lambda layer, name: isinstance(layer, nn.Linear) and "blocks." in name)
    network.requires_grad_(False)


@torch.no_grad()
def dequantise(network: nn.Module) -> None:
    """Give a network plain weights with the values that its quantised ones stand for, in place."""
    for layer in network.modules():
        weight = layer._parameters.get("weight")
        if isinstance(layer, nn.Linear) and weight is not None and is_quantised(weight):
            plain: Tensor = weight.dequantize()
            layer.weight = nn.Parameter(plain.clone(), requires_grad=False)


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor stands for others, as quantised ones do."""
    return hasattr(tensor, "__tensor_flatten__")


def parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: itself, or what a quantised one keeps."""
    if not is_quantised(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    for name in names:
        yield from parts_of(getattr(tensor, name))
