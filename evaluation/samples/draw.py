"""Filling a store: fixed blocks of indices, divided over processes, of which only what is missing is made.

A block is always drawn whole and in the same company, so that a sample is the same for any number of processes and
after any interruption; with another batch size it differs by the rounding of the network alone.

Shapes: pixels [B, 3, H, W] or [B, 3, T, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm

from fewstep.evaluation.samples.store import SampleStore

# Prompts of a block and their indices to a sample each: pixels, or the frames of a film one by one.
Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Tensor] | Tensor | Sequence[Iterable[np.ndarray]]]


def missing_blocks(store: SampleStore, count: int, *, batch_size: int) -> list[Sequence[int]]:
    """The blocks of samples 0 ... count - 1 of which any is missing. Raises ValueError for a batch below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1")
    there = store.samples().keys()
    blocks = blocks_of(range(count), batch_size)
    return [block for block in blocks if any(index not in there for index in block)]


def blocks_of(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Indices in parts of a batch."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def fill(
    store: SampleStore,
    draw: Draw,
    prompts: Sequence[str],
    count: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Make the missing samples of this process's share of the blocks; returns how many. Sample i has prompt i modulo
    their number.
    """
    mine = missing_blocks(store, count, batch_size=batch_size)[rank::world_size]
    return fill_blocks(store, draw, mine, lambda index: prompts[index % len(prompts)], rank=rank)


def fill_blocks(
    store: SampleStore, draw: Draw, blocks: Sequence[Sequence[int]], prompt_of: Callable[[int], str], *, rank: int = 0
) -> int:
    """Make what is missing of these blocks; returns how many samples."""
    there, made = store.samples().keys(), 0
    title = f"samples of {store.plan.pipeline}, seed {store.plan.seed}"
    for block in tqdm(blocks, desc=title, unit="batch", leave=False):
        texts = [prompt_of(index) for index in block]
        samples = draw(texts, block)
        for index, text, one in zip(block, texts, samples, strict=True):
            if index not in there:
                store.add(index, text, one, rank=rank)
                made += 1
    return made
