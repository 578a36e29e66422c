"""Random numbers as a function of (seed, step, stream, index) alone.

A row does not know which batch or process it is drawn in, so a resumed run equals an uninterrupted one and two
processes draw together what one process draws. Rows are drawn on the CPU, so every device gets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def sample_noise(
    seed: int,
    indices: Sequence[int] | Tensor,
    shape: tuple[int, ...],
    *,
    step: int = 0,
    stream: str = "noise",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise [len(indices), *shape]; each row depends on (seed, step, stream, its index, shape) only.

    Drawn in fp32 and then cast, so every dtype gets the same numbers up to rounding. `indices` are global sample
    indices; a tensor of them is one-dimensional and integer.

    Raises:
        ValueError: dtype is not floating, or indices are not one-dimensional integers.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"noise needs a floating dtype, got {dtype}")
    rows = _index_list(indices)
    out = np.empty((len(rows), *shape), dtype=np.float32)
    for row, generator in enumerate(_generators(seed, step, stream, rows)):
        out[row] = generator.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(out).to(device=device, dtype=dtype)


def sample_uniform(
    seed: int,
    indices: Sequence[int] | Tensor,
    shape: tuple[int, ...],
    *,
    step: int = 0,
    stream: str = "uniform",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1), [len(indices), *shape], with the same contract as `sample_noise`.

    Raises:
        ValueError: dtype is neither fp32 nor fp64 (a narrower one rounds up to 1), or indices are not integers [M].
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform numbers in [0, 1) need torch.float32 or torch.float64, got {dtype}")
    rows = _index_list(indices)
    out = np.empty((len(rows), *shape), dtype=np.float32)
    for row, generator in enumerate(_generators(seed, step, stream, rows)):
        out[row] = generator.random(shape, dtype=np.float32)
    return torch.from_numpy(out).to(device=device, dtype=dtype)


def shared_integer(seed: int, step: int, stream: str, high: int) -> int:
    """A uniform integer in [0, high), the same in every process since nothing of the process enters.

    Raises:
        ValueError: high < 1.
    """
    if high < 1:
        raise ValueError(f"high must be at least 1, got {high}")
    # 128 bits modulo a small number: the bias is below high / 2 ** 128.
    return _key(seed, step, stream, None) % high


def _index_list(indices: Sequence[int] | Tensor) -> list[int]:
    if not isinstance(indices, Tensor):
        return [int(index) for index in indices]
    if indices.ndim != 1 or indices.dtype.is_floating_point or indices.dtype == torch.bool:
        raise ValueError(f"indices must be integers of shape [M], got {indices.dtype} {tuple(indices.shape)}")
    return indices.tolist()


def _key(seed: int, step: int, stream: str, index: int | None) -> int:
    """128-bit key of one row. The stream stands last, so no name of a stream can imitate another key."""
    text = f"{int(seed)} {int(step)} {index} {stream}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _generators(seed: int, step: int, stream: str, rows: Sequence[int]) -> Iterator[np.random.Generator]:
    """The generator of each row in turn: `Generator(Philox(key=its key))`. It is one object, so use it before the next.

    Philox takes all 128 bits of the key; the CPU generator of torch keeps 32 of its seed, and a run draws enough rows
    for two of them to coincide. Setting the state of one Philox is much faster than making another.
    """
    philox = np.random.Philox(key=0)
    generator, fresh = np.random.Generator(philox), philox.state
    for index in rows:
        key = _key(seed, step, stream, index)
        words = np.array([key & 0xFFFFFFFFFFFFFFFF, key >> 64], dtype=np.uint64)
        philox.state = {**fresh, "state": {"counter": fresh["state"]["counter"], "key": words}}
        yield generator


@dataclass(frozen=True)
class Draw:
    """Random numbers of a batch as a function of (seed, stream, sample number in the whole run)."""

    seed: int
    indices: list[int]
    device: torch.device

    def noise(self, shape: tuple[int, ...], stream: str) -> Tensor:
        """Standard normal [B, *shape], fp32."""
        return sample_noise(self.seed, self.indices, shape, stream=stream, device=self.device)

    def uniform(self, stream: str) -> Tensor:
        """Uniform in [0, 1), [B], fp32."""
        return sample_uniform(self.seed, self.indices, (), stream=stream, device=self.device)
