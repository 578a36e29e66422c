"""Masks in the forms other attention functions take: a matrix of truth values, and the block mask of FlexAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_schedule import classify_tiles

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def dense(mask: AttentionMask) -> Tensor:
    """bool [1 or B, Nq, Nk] on the mask's device, True where the query sees the key; for references and pictures."""
    columns = torch.arange(mask.keys, dtype=torch.int32, device=mask.intervals.device)
    seen = torch.zeros(mask.batch, mask.queries, mask.keys, dtype=torch.bool, device=columns.device)
    for ranges in mask.intervals.unbind(dim=2):
        seen |= (columns >= ranges[..., :1]) & (columns < ranges[..., 1:])
    return seen


def flex_block_mask(mask: AttentionMask, block: int = 128) -> BlockMask:
    """The mask for `torch.nn.attention.flex_attention`, without evaluating it on all pairs of tokens.

    Equal to what `create_block_mask` makes of the same rule, so a narrower last tile is never a full one. Promises
    about tangents are lost: FlexAttention has no tangent.

    Args:
        mask: queries and keys; heads are broadcast, and so is the batch where the mask has one entry.
        block: tokens per tile on both sides.

    Raises:
        ValueError: a tile size below 1, no queries or no keys, or a key bias, which a score_mod would add.
    """
    if mask.key_bias is not None:
        raise ValueError(
            "A block mask of FlexAttention has no key bias; convert mask.ranges, and add it as a score_mod."
        )
    if block < 1 or mask.queries == 0 or mask.keys == 0:
        raise ValueError(
            f"FlexAttention needs tokens and tiles, but the mask has {mask.queries} queries and {mask.keys} keys and "
            f"block={block}; give at least 1 of each."
        )
    from torch.nn.attention.flex_attention import BlockMask  # Slow to import, and few need it.

    touched, full = classify_tiles(mask.intervals, mask.keys, block, block)
    full[:, mask.queries // block :] = False
    full[:, :, mask.keys // block :] = False
    intervals, shared = mask.intervals, mask.batch == 1

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = intervals[0 if shared else b, q]
        seen = (k >= row[0, 0]) & (k < row[0, 1])
        for r in range(1, intervals.shape[2]):
            seen = seen | (k >= row[r, 0]) & (k < row[r, 1])
        return seen

    partial_counts, partial_tiles = ordered_tiles(touched & ~full)
    full_counts, full_tiles = ordered_tiles(full)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_tiles,
        full_counts,
        full_tiles,
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(mask.queries, mask.keys),
    )


def ordered_tiles(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(counts int32 [Bm, 1, nq], indices int32 [Bm, 1, nq, nk]) of FlexAttention: chosen tiles first, increasing."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
