"""Filling a store: fixed blocks of indices, divided over processes, of which only what is missing is made.

A block is always drawn whole and in the same company, so that a sample is the same for any number of processes and
after any interruption; with another batch size it differs by the rounding of the network alone.

Shapes: pixels [B, 3, H, W] or [B, 3, T, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

from fewstep.evaluation.samples.store import SampleStore

# Prompts of a block and their indices to pixels.
Draw = Callable[[Sequence[str], Sequence[int]], Tensor]


def missing_blocks(store: SampleStore, count: int, *, batch_size: int) -> list[range]:
    """The blocks of samples 0 ... count - 1 of which any is missing. Raises ValueError for a batch below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1")
    there = store.samples().keys()
    blocks = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return [block for block in blocks if any(index not in there for index in block)]


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
    there, made = store.samples().keys(), 0
    mine = missing_blocks(store, count, batch_size=batch_size)[rank::world_size]
    for block in tqdm(
        mine, desc=f"samples of {store.plan.pipeline}, seed {store.plan.seed}", unit="batch", leave=False
    ):
        texts = [prompts[index % len(prompts)] for index in block]
        pixels = draw(texts, block)
        for index, text, one in zip(block, texts, pixels, strict=True):
            if index not in there:
                store.add(index, text, one, rank=rank)
                made += 1
    return made
