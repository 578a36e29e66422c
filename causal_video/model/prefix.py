"""Keys and values of frames that a chunk sees and that are not computed again.

Legend: L layers, B batch, H heads, N tokens, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StoredKeysValues(Protocol):
    """Keys (before RoPE) and values of some tokens, in whatever precision they are kept."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, d] of one layer."""
        ...

    def bytes(self) -> int:
        """Size of the stored numbers."""
        ...


@dataclass(frozen=True, eq=False)
class KeysValues:
    """Keys after the query-key norm and before RoPE, and values, of all layers: [L, B, H, N, d]. Not to be written to.

    Raises:
        ValueError: the shapes are not five-dimensional, or differ.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        if self.keys.ndim != 5 or self.keys.shape != self.values.shape:
            raise ValueError(
                f"keys and values must both be [L, B, H, N, d], got {list(self.keys.shape)} and "
                f"{list(self.values.shape)}"
            )

    @property
    def tokens(self) -> int:
        """N."""
        return self.keys.shape[3]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, d] of one layer."""
        return self.keys[index], self.values[index]

    def bytes(self) -> int:
        """Size of the numbers."""
        return self.keys.nbytes + self.values.nbytes

    def detach(self) -> KeysValues:
        """The same numbers without a graph."""
        return KeysValues(self.keys.detach(), self.values.detach())


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a chunk attends to beside itself.

    Attributes:
        parts: stored keys and values in the order of their positions; none for a first chunk.
        positions: temporal position of each frame in `parts`.
        query_positions: temporal position of each frame of the chunk.
    """

    parts: tuple[StoredKeysValues, ...]
    positions: tuple[int, ...]
    query_positions: tuple[int, ...]

    def with_own(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, d] of the parts and then of the chunk itself, in one layer."""
        if len(self.parts) == 0:
            return key, value
        stored = [part.layer(layer) for part in self.parts]
        keys = torch.cat([*(k.to(key.dtype) for k, _ in stored), key], dim=2)
        values = torch.cat([*(v.to(value.dtype) for _, v in stored), value], dim=2)
        return keys, values
