"""Keys and values in one byte per number, with a scale per token and head.

Legend: L layers, B batch, H heads, N tokens, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.causal_video.model.prefix import KeysValues, StoredKeysValues
from fewstep.causal_video.policy import QuantiseKind

INT8_LARGEST = 127.0
# e4m3 without infinities: largest number, relative half step of normal numbers, and half the step below them.
FP8_LARGEST = 448.0


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """numbers [..., d] int8 or float8_e4m3fn, and scales [..., 1] fp32; their product stands for the tensor."""

    numbers: Tensor
    scales: Tensor

    def bytes(self) -> int:
        """Size of numbers and scales."""
        return self.numbers.nbytes + self.scales.nbytes

    def restore(self, index: int, dtype: torch.dtype) -> Tensor:
        """Entry `index` of the first axis, multiplied out."""
        return (self.numbers[index].to(self.scales.dtype) * self.scales[index]).to(dtype)


@dataclass(frozen=True, eq=False)
class QuantisedKeysValues:
    """Keys before RoPE and values, all layers [L, B, H, N, d]; a layer is restored when it is read.

    fp8 is storage only: the numbers are multiplied out before attention.
    """

    keys: QuantisedTensor
    values: QuantisedTensor
    dtype: torch.dtype

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, d] of one layer, in the dtype they had."""
        return self.keys.restore(index, self.dtype), self.values.restore(index, self.dtype)

    def bytes(self) -> int:
        """Size of numbers and scales."""
        return self.keys.bytes() + self.values.bytes()


def stored(keys_values: KeysValues, kind: QuantiseKind) -> StoredKeysValues:
    """Keys and values as the cache keeps them, without a graph.

    Raises:
        ValueError: a number is not finite: one NaN would be an unremarkable byte.
    """
    keys_values = keys_values.detach()
    if kind == "none":
        return keys_values
    return QuantisedKeysValues(
        quantise(keys_values.keys, kind), quantise(keys_values.values, kind), keys_values.keys.dtype
    )


def quantise(x: Tensor, kind: QuantiseKind) -> QuantisedTensor:
    """One byte per number, the largest of each [d] on the largest number of the kind.

    The error of a number is at most half a step: scale / 2 for int8, the larger of |x| / 16 and scale / 1024 for fp8.

    Raises:
        ValueError: x is not finite, or the kind is "none".
    """
    if kind not in ("int8", "fp8"):
        raise ValueError(f"kind must be int8 or fp8, got {kind!r}")
    wide = x.float()
    largest = wide.abs().amax(dim=-1, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("keys or values are not finite and cannot be quantised; the network has diverged")
    # A row of zeros keeps the scale 1: 0 / 1.
    limit = INT8_LARGEST if kind == "int8" else FP8_LARGEST
    scales = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    scaled = (wide / scales).clamp(-limit, limit)
    numbers = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return QuantisedTensor(numbers, scales)
