"""Which tiles of an attention matrix are computed, and in which class: derived from key ranges without the matrix.

A row range [s, e) touches the key tiles floor(s / T) to ceil(e / T) - 1 and covers ceil(s / T) to floor(e / T) - 1. The
last, possibly narrower tile counts as covered when e is the number of keys. Counting both per query tile with
difference arrays classifies all tiles at once, in O(Nq R + nq nk) memory and exactly for every mask.

Legend: Bm masks, Nq queries, R ranges per query, nq query tiles, nk key tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 4


@dataclass(frozen=True, eq=False)
class TileSchedule:
    """The non-empty tiles of one mask, by query tile and by key tile.

    Classes: 0 full and the other side active, 1 full and inactive, 2 partial and active, 3 partial and inactive. The
    other side is the key tile in `row_*` and the query tile in `column_*`. A tile is full iff each of its queries sees
    each of its keys, counting those that exist: the last tile of a side may be narrower.

    Attributes:
        query_tile, key_tile: tokens per tile.
        queries, keys: tokens of the mask.
        row_ptr: int32 [Bm * nq * 4 + 1]. The segment s = (b * nq + a) * 4 + c holds the key tiles of class c of query
            tile a under mask b: row_tiles[row_ptr[s] : row_ptr[s + 1]], increasing.
        row_tiles: int32 [tiles].
        column_ptr, column_tiles: the same with the roles of queries and keys exchanged, [Bm * nk * 4 + 1] and [tiles].
        row_order, column_order: int32 [Bm, nq] and [Bm, nk], tiles of a side by decreasing work.
        query_active, key_active: bool [nq] and [nk], whether any token of the tile is active.
        row_active: bool [Bm, nq], whether the query tile or any key tile scheduled for it is active.
    """

    query_tile: int
    key_tile: int
    queries: int
    keys: int
    row_ptr: Tensor
    row_tiles: Tensor
    column_ptr: Tensor
    column_tiles: Tensor
    row_order: Tensor
    column_order: Tensor
    query_active: Tensor
    key_active: Tensor
    row_active: Tensor

    @property
    def full(self) -> int:
        """Number of full tiles, over all masks; waits for the device."""
        return int(self._per_class()[:2].sum())

    @property
    def partial(self) -> int:
        """Number of partial tiles, over all masks; waits for the device."""
        return int(self._per_class()[2:].sum())

    @property
    def empty(self) -> int:
        """Number of tiles that are not computed, over all masks."""
        return self.row_order.numel() * self.key_active.numel() - self.row_tiles.numel()

    def _per_class(self) -> Tensor:
        return self.row_ptr.diff().view(-1, CLASSES).sum(0)


def build_schedule(
    intervals: Tensor,
    keys: int,
    query_tile: int,
    key_tile: int,
    query_active: Tensor | None,
    key_active: Tensor | None,
) -> TileSchedule:
    """Classify all tiles of a mask.

    Args:
        intervals: int32 [Bm, Nq, R, 2], canonical as in `AttentionMask`.
        keys: number of keys.
        query_tile, key_tile: tokens per tile, at least 1.
        query_active, key_active: bool [Nq] and [keys]; None is all of them.

    Raises:
        ValueError: a tile size below 1.
    """
    if query_tile < 1 or key_tile < 1:
        raise ValueError(f"Tiles of {query_tile} x {key_tile} tokens; both sides need at least 1, typically 64 or 128.")
    queries = intervals.shape[1]
    touched, full = classify_tiles(intervals, keys, query_tile, key_tile)
    batch, query_tiles, key_tiles = touched.shape
    query_any = tile_activity(query_active, queries, query_tile, intervals.device)
    key_any = tile_activity(key_active, keys, key_tile, intervals.device)

    b, row, column = touched.nonzero(as_tuple=True)
    shape_class = torch.where(full[b, row, column], 0, 2)
    row_ptr, row_tiles = compress((b * query_tiles + row), shape_class + ~key_any[column], column, batch * query_tiles)
    column_ptr, column_tiles = compress(b * key_tiles + column, shape_class + ~query_any[row], row, batch * key_tiles)
    row_counts = row_ptr.diff().view(batch, query_tiles, CLASSES)
    column_counts = column_ptr.diff().view(batch, key_tiles, CLASSES)
    return TileSchedule(
        query_tile=query_tile,
        key_tile=key_tile,
        queries=queries,
        keys=keys,
        row_ptr=row_ptr,
        row_tiles=row_tiles,
        column_ptr=column_ptr,
        column_tiles=column_tiles,
        row_order=row_counts.sum(-1).argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        column_order=column_counts.sum(-1).argsort(dim=-1, descending=True, stable=True).to(torch.int32),
        query_active=query_any,
        key_active=key_any,
        row_active=query_any | (row_counts[..., 0] + row_counts[..., 2] > 0),
    )


def classify_tiles(intervals: Tensor, keys: int, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor]:
    """(touched, full), bool [Bm, nq, nk]: some query of the tile sees some key of it; each sees each."""
    batch, queries = intervals.shape[:2]
    query_tiles, key_tiles = -(-queries // query_tile), -(-keys // key_tile)
    row_tile = torch.arange(queries, device=intervals.device) // query_tile
    row_tile = row_tile + query_tiles * torch.arange(batch, device=intervals.device)[:, None]
    starts, ends = intervals[..., 0].long(), intervals[..., 1].long()
    after = torch.where(ends > starts, -(-ends // key_tile), starts // key_tile)
    touching = count_rows(row_tile, starts // key_tile, after, (batch, query_tiles, key_tiles))
    first = -(-starts // key_tile)
    after = torch.where((ends == keys) & (ends > starts), key_tiles, ends // key_tile)
    covering = count_rows(row_tile, first, after.maximum(first), (batch, query_tiles, key_tiles))
    rows = torch.full((query_tiles, 1), query_tile, dtype=torch.int32, device=intervals.device)
    rows[-1:] = queries - query_tile * (query_tiles - 1)
    return touching > 0, covering == rows


def count_rows(row_tile: Tensor, first: Tensor, after: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """int32 `shape`: how many ranges [first, after) of key tiles hold each key tile, by query tile."""
    batch, query_tiles, key_tiles = shape
    size = key_tiles + 1
    change = torch.zeros(batch * query_tiles * size, dtype=torch.int32, device=first.device)
    base = row_tile.unsqueeze(-1) * size
    ones = change.new_ones(()).expand(first.numel())
    change.scatter_add_(0, (base + first).flatten(), ones)
    change.scatter_add_(0, (base + after).flatten(), -ones)
    return change.view(batch, query_tiles, size).cumsum(-1, dtype=torch.int32)[..., :key_tiles]


def tile_activity(active: Tensor | None, tokens: int, tile: int, device: torch.device) -> Tensor:
    """bool [tiles]: whether any token of each tile is active; None is all of them."""
    tiles = -(-tokens // tile)
    if active is None:
        return torch.ones(tiles, dtype=torch.bool, device=device)
    padded = torch.zeros(tiles * tile, dtype=torch.bool, device=device)
    padded[:tokens] = active
    return padded.view(tiles, tile).any(-1)


def compress(line: Tensor, tile_class: Tensor, other: Tensor, lines: int) -> tuple[Tensor, Tensor]:
    """(ptr, tiles): tiles grouped by line and class; `other` is increasing for each line and stays so."""
    segment = line * CLASSES + tile_class
    order = segment.argsort(stable=True)
    ptr = torch.zeros(lines * CLASSES + 1, dtype=torch.int32, device=line.device)
    ptr[1:] = torch.bincount(segment, minlength=lines * CLASSES).cumsum(0)
    return ptr, other[order].to(torch.int32)
