"""What the tiled attention walks over: groups of heads that fit a small scratch, and runs of key tiles of one kind.

Legend: B batch, G key heads, H = G * repeat query heads; h heads of a group, one per key head; i rows of a query tile
times `repeat`; w keys of a run; D width of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fewstep.kernels.mask import AttentionMask

# Larger tiles keep matrix products busier, smaller ones waste less at the edges of a mask.
QUERY_TILES = (512, 256, 128)
WASTE_FOR_LARGER = 1.05
KEY_TILE = 64
# Longer runs save calls, shorter ones keep the scores of a run in the cache of a core.
RUN_WIDTH = 512
# Bytes of the buffers of one group of heads: about what two cores keep near themselves.
GROUP_BYTES = 9 * 2**19


@dataclass(frozen=True)
class Run:
    """Neighbouring key tiles of one kind: keys start to stop.

    `partial`: some query of the tile does not see some key of the run. `active`: tangents of its keys or values may be
    other than zero.
    """

    start: int
    stop: int
    partial: bool
    active: bool


@dataclass(frozen=True)
class QueryTile:
    """Queries start to stop and the runs of keys that any of them sees, active ones first."""

    start: int
    stop: int
    active: bool
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Tiling:
    """The walk over one mask: `tiles[b]` for each mask of the batch, and the mask's key ranges [b, Nq, R, 2]."""

    intervals: Tensor
    tiles: tuple[tuple[QueryTile, ...], ...]
    query_tile: int


_tilings: WeakKeyDictionary[AttentionMask, Tiling] = WeakKeyDictionary()


def tiling_of(mask: AttentionMask) -> Tiling:
    """The walk over a mask, built once and kept as long as the mask lives."""
    mask = mask.ranges
    tiling = _tilings.get(mask)
    if tiling is None:
        tiling = _tilings[mask] = build_tiling(mask)
    return tiling


def build_tiling(mask: AttentionMask) -> Tiling:
    """Merge the tiles of the mask's schedule into runs of at most `RUN_WIDTH` keys."""
    query_tile = choose_query_tile(mask)
    schedule = mask.schedule(query_tile, KEY_TILE)
    pointers, columns = schedule.row_ptr.tolist(), schedule.row_tiles.tolist()
    active = schedule.query_active.tolist()
    count = len(active)
    tiles: list[tuple[QueryTile, ...]] = []
    for batch in range(mask.batch):
        rows: list[QueryTile] = []
        for tile in range(count):
            segment = (batch * count + tile) * 4
            runs: list[Run] = []
            # Active runs come first: their first mean of the score tangents is what later runs are centred on.
            for first in (0, 1):
                full, partial = (
                    columns[pointers[segment + kind] : pointers[segment + kind + 1]] for kind in (first, first + 2)
                )
                runs += merge_tiles(full, partial, mask.keys, active=first == 0)
            start = tile * query_tile
            rows.append(QueryTile(start, min(start + query_tile, mask.queries), active[tile], tuple(runs)))
        tiles.append(tuple(rows))
    return Tiling(mask.intervals, tuple(tiles), query_tile)


def choose_query_tile(mask: AttentionMask) -> int:
    """The largest query tile that computes hardly more pairs of tokens than the smallest one."""
    schedules = [mask.schedule(tile, KEY_TILE) for tile in QUERY_TILES]
    computed = [(s.full + s.partial) * s.query_tile for s in schedules]
    fitting = [count <= WASTE_FOR_LARGER * computed[-1] for count in computed]
    return QUERY_TILES[fitting.index(True)]


def merge_tiles(full: list[int], partial: list[int], keys: int, *, active: bool) -> Iterator[Run]:
    """Runs of neighbouring key tiles out of increasing lists of them; one partial tile makes its run partial.

    Hiding some keys of a long run costs less than the calls of one more run.
    """
    tiles, hidden = sorted([*full, *partial]), set(partial)
    longest = RUN_WIDTH // KEY_TILE
    first = 0
    for place in range(1, len(tiles) + 1):
        if place == len(tiles) or tiles[place] != tiles[place - 1] + 1 or place - first == longest:
            is_partial = not hidden.isdisjoint(tiles[first:place])
            yield Run(tiles[first] * KEY_TILE, min((tiles[place - 1] + 1) * KEY_TILE, keys), is_partial, active)
            first = place


@dataclass(frozen=True)
class HeadGroup:
    """Key heads that are computed together: all of several samples, or some of one.

    `mask` is the place of their mask in a batch of masks.
    """

    samples: slice
    key_heads: slice
    repeat: int
    mask: int

    def keys_of(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[h, N, D] out of [B, G, N, D]; a view where strides and dtype allow."""
        return x[self.samples, self.key_heads].flatten(0, 1).to(dtype)

    def read_rows(self, x: Tensor, tile: QueryTile, target: Tensor) -> Tensor:
        """Copy the tile's rows of x [B, H, Nq, D] to `target` [h, i, D], which comes back.

        Rows of the query heads that share a key head follow each other.
        """
        chosen = x[self.samples, self.query_heads, tile.start : tile.stop]
        heads = (chosen.shape[0], chosen.shape[1] // self.repeat)
        place = target.unflatten(1, (self.repeat, chosen.shape[2])).unflatten(0, heads)
        place.copy_(chosen.unflatten(1, (heads[1], self.repeat)))
        return target

    def rows_of(self, x: Tensor, tile: QueryTile, dtype: torch.dtype) -> Tensor:
        """`read_rows` to a new tensor."""
        samples, heads = x[self.samples, self.query_heads].shape[:2]
        rows = (tile.stop - tile.start) * self.repeat
        return self.read_rows(x, tile, x.new_empty((samples * heads // self.repeat, rows, x.shape[3]), dtype=dtype))

    def write_rows(self, target: Tensor, tile: QueryTile, rows: Tensor) -> None:
        """Put rows [h, i, ...] back to their place in [B, H, Nq, ...]."""
        place = target[self.samples, self.query_heads, tile.start : tile.stop]
        samples, heads = place.shape[:2]
        place.copy_(rows.view(samples, heads, *place.shape[2:]))

    def write_keys(self, target: Tensor, keys: Tensor) -> None:
        """Put [h, N, D] back to its place in [B, G, N, D]."""
        place = target[self.samples, self.key_heads]
        place.copy_(keys.view(place.shape))

    @property
    def query_heads(self) -> slice:
        return slice(self.key_heads.start * self.repeat, self.key_heads.stop * self.repeat)


def head_groups(q: Tensor, k: Tensor, tiling: Tiling, *, upcasts: bool, buffers: int) -> Iterator[HeadGroup]:
    """Cut batch and heads into groups whose buffers stay near `GROUP_BYTES`.

    Args:
        q: [B, H, Nq, D].
        k: [B, G, Nk, D].
        tiling: the walk; a batch of masks needs a group per sample.
        upcasts: keys and values are copied to a wider dtype.
        buffers: score buffers of one run.
    """
    batch, key_heads, keys = k.shape[:3]
    if batch == 0 or key_heads == 0:
        return
    repeat = q.shape[1] // key_heads
    size = 8 if q.dtype == torch.float64 else 4
    rows = min(tiling.query_tile, q.shape[2]) * repeat
    # Keys, values and the tangents of both.
    copies = 4 * keys * k.shape[3] * size if upcasts else 0
    per_head = copies + rows * min(RUN_WIDTH, keys) * size * buffers
    fitting = max(1, GROUP_BYTES // max(1, per_head))
    per_sample = len(tiling.tiles) > 1
    if fitting >= key_heads:
        step = 1 if per_sample else fitting // key_heads
        for first in range(0, batch, step):
            samples = slice(first, min(first + step, batch))
            yield HeadGroup(samples, slice(0, key_heads), repeat, first if per_sample else 0)
        return
    # Groups of equal size: a short last one would leave threads idle.
    parts = -(-key_heads // fitting)
    for sample in range(batch):
        for part in range(parts):
            heads = slice(part * key_heads // parts, (part + 1) * key_heads // parts)
            yield HeadGroup(slice(sample, sample + 1), heads, repeat, sample if per_sample else 0)


class Scratch:
    """Numbered buffers of a call, reused by all its tiles: fetching memory costs more than what is done in it.

    Args:
        like: a tensor with the dtype and device of the computation.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[int, Tensor] = {}

    def view(self, place: int, shape: tuple[int, int, int]) -> Tensor:
        """The start of one buffer as a contiguous tensor, holding what was left there; it grows on demand."""
        size = shape[0] * shape[1] * shape[2]
        buffer = self.flat.get(place)
        if buffer is None or buffer.numel() < size:
            buffer = self.flat[place] = self.like.new_empty(size)
        return buffer[:size].view(shape)


def hide(scores: Tensor, intervals: Tensor, run: Run) -> None:
    """Set scores [h, repeat * i, w] to -inf where key ranges [i, R, 2] of the queries do not hold the key."""
    columns = torch.arange(run.start, run.stop, dtype=torch.int32, device=scores.device)
    starts, stops = intervals[..., 0], intervals[..., 1]
    seen = (columns >= starts[:, :1]) & (columns < stops[:, :1])
    for r in range(1, intervals.shape[1]):
        seen |= (columns >= starts[:, r, None]) & (columns < stops[:, r, None])
    scores.unflatten(1, (-1, len(intervals))).masked_fill_(~seen, float("-inf"))
