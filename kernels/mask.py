"""Attention masks as key ranges: each query sees the union of a few ranges of keys.

Ranges take O(N) memory and describe exactly what video training needs: full, causal, block-causal with chunks of any
lengths, windows with sinks, teacher forcing on a packed [clean; noisy] sequence, packed documents, a length per sample.
A mask may also promise that tangents are zero at some tokens, which saves kernels the work there.

Legend: B batch, Nq queries, Nk keys, R ranges per query; chunks are counted in tokens, windows and sinks in chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fewstep.kernels.mask_intervals import (
    canonical_intervals,
    check_activity,
    check_intervals,
    check_key_bias,
    check_lengths,
    chunk_bounds,
    either_promise,
    finite_bias,
    repeat_rows,
    visible_chunks,
    write_runs,
)
from fewstep.kernels.mask_schedule import TileSchedule, build_schedule

Device = torch.device | str
# Elements of the predicate that `from_predicate` looks at together.
PREDICATE_BLOCK = 2**22
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_handles = itertools.count(1)


@dataclass(frozen=True, eq=False, repr=False)
class AttentionMask:
    """Which keys each query sees. Immutable: do not write to its tensors; a copy is a mask of its own.

    Attributes:
        intervals: int32 [1 or B, Nq, R, 2]. Query i sees key j iff some start <= j < end. Canonical: sorted, disjoint,
            touching ranges merged, padding (0, 0) at the end (`canonical_intervals` makes it so).
        keys: Nk.
        query_active: bool [Nq]. False promises that tangents of q at this query are exactly zero. None: no promise.
        key_active: bool [Nk]. The same for tangents of k and v.
        verify: check the promise on each call with tangents, which waits for the device.
        key_bias: [1 or B, Nk] in fp32 or fp64, what `with_key_bias` adds to the scores of each key.
        handle: unique positive number; `mask_of` finds the mask by it. 0 is no mask's.

    Raises:
        ValueError: wrong dtype, shape or device, a range beyond the keys, or ranges that are not canonical.
    """

    intervals: Tensor
    keys: int
    query_active: Tensor | None = None
    key_active: Tensor | None = None
    verify: bool = False
    key_bias: Tensor | None = field(init=False, default=None)
    handle: int = field(init=False)
    _schedules: dict[tuple[int, int], TileSchedule] = field(init=False, default_factory=dict)
    _elsewhere: dict[torch.device, AttentionMask] = field(init=False, default_factory=dict)
    _ranges: AttentionMask | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_intervals(self.intervals, self.keys)
        object.__setattr__(self, "intervals", self.intervals.contiguous())
        check_activity("query_active", self.query_active, self.queries, self.intervals.device)
        check_activity("key_active", self.key_active, self.keys, self.intervals.device)
        object.__setattr__(self, "handle", next(_handles))
        _masks[self.handle] = self

    def __reduce__(self) -> tuple[Callable[..., AttentionMask], tuple[object, ...]]:
        if self.key_bias is not None:
            return AttentionMask.with_key_bias, (self.ranges, self.key_bias)
        return AttentionMask, (self.intervals, self.keys, self.query_active, self.key_active, self.verify)

    def __repr__(self) -> str:
        ranges, device = self.intervals.shape[2], self.intervals.device
        return f"AttentionMask({self.queries} queries, {self.keys} keys, batch {self.batch}, {ranges} ranges, {device})"

    @property
    def queries(self) -> int:
        """Nq."""
        return self.intervals.shape[1]

    @property
    def ranges(self) -> AttentionMask:
        """The mask without its key bias, which what depends on the ranges alone is kept by."""
        return self if self._ranges is None else self._ranges

    @property
    def batch(self) -> int:
        """Number of masks: 1, shared by all samples, or one per sample."""
        return self.intervals.shape[0]

    def schedule(self, query_tile: int, key_tile: int) -> TileSchedule:
        """The tiles to compute, on the mask's device; built once per tile size and kept.

        Raises:
            ValueError: a tile size below 1.
        """
        size = (query_tile, key_tile)
        if size not in self._schedules:
            self._schedules[size] = build_schedule(
                self.intervals, self.keys, query_tile, key_tile, self.query_active, self.key_active
            )
        return self._schedules[size]

    def to(self, device: Device) -> AttentionMask:
        """The mask on a device: itself if it is there, else a copy that is made once and kept."""
        if torch.device(device) == self.intervals.device:
            return self
        place = torch.empty(0, device=device).device  # "cuda" is the current one of several.
        if place == self.intervals.device:
            return self
        if self.key_bias is not None:
            return self.ranges.to(place).with_key_bias(self.key_bias.to(place))
        if place not in self._elsewhere:
            query_active = None if self.query_active is None else self.query_active.to(place)
            key_active = None if self.key_active is None else self.key_active.to(place)
            moved = AttentionMask(self.intervals.to(place), self.keys, query_active, key_active, self.verify)
            self._elsewhere[place] = moved
        return self._elsewhere[place]

    def with_activity(self, *, queries: Tensor | None, keys: Tensor | None, verify: bool = False) -> AttentionMask:
        """The same mask with another promise about tangents; None promises nothing.

        Args:
            queries: bool [Nq], False where tangents of q are exactly zero.
            keys: bool [Nk], False where tangents of k and v are exactly zero.
            verify: check the promise on each call with tangents.

        Raises:
            ValueError: wrong dtype, shape or device.
        """
        mask = AttentionMask(self.intervals, self.keys, queries, keys, verify)
        return mask if self.key_bias is None else mask.with_key_bias(self.key_bias)

    def with_key_bias(self, bias: Tensor) -> AttentionMask:
        """The same ranges with a number for each key that is added to its scores, without gradient or tangent.

        Made for each call: it shares the schedules of this mask, and its tensor is not copied. Code that is compiled
        would keep the first one for good. A key that nobody is to see has -1e4 or less, and weighs exactly 0.

        Args:
            bias: [1 or B, Nk], a floating dtype, on the mask's device.

        Raises:
            ValueError: wrong dtype, shape or device, or a bias that has a gradient.
        """
        check_key_bias(bias, self.keys, self.intervals.device)
        mask = object.__new__(AttentionMask)
        for name in ("intervals", "keys", "query_active", "key_active", "verify", "_schedules", "_elsewhere"):
            object.__setattr__(mask, name, getattr(self, name))
        for name, value in (("key_bias", finite_bias(bias)), ("_ranges", self.ranges), ("handle", next(_handles))):
            object.__setattr__(mask, name, value)
        _masks[mask.handle] = mask
        return mask


_masks: WeakValueDictionary[int, AttentionMask] = WeakValueDictionary()


def mask_of(handle: int) -> AttentionMask:
    """The live mask with this handle.

    Raises:
        ValueError: there is none.
    """
    mask = _masks.get(handle)
    if mask is None:
        raise ValueError(
            f"No mask has the handle {handle}; keep the AttentionMask alive for as long as its handle is used."
        )
    return mask


def full(queries: int, keys: int | None = None, *, device: Device = "cpu") -> AttentionMask:
    """Every query sees every key; as many keys as queries unless given.

    Raises:
        ValueError: a negative number of tokens.
    """
    keys = queries if keys is None else keys
    check_lengths("queries and keys", [queries, keys], least=0)
    intervals = torch.zeros(1, queries, 1, 2, dtype=torch.int32, device=device)
    intervals[..., 1] = keys
    return AttentionMask(intervals, keys)


@lru_cache(maxsize=64)
def unmasked(queries: int, keys: int, device: torch.device) -> AttentionMask:
    """`full`, made once for each pair of lengths and kept: the mask of calls without one."""
    return full(queries, keys, device=device)


def causal(tokens: int, *, device: Device = "cpu") -> AttentionMask:
    """Query i sees keys 0 to i.

    Raises:
        ValueError: a negative number of tokens.
    """
    check_lengths("tokens", [tokens], least=0)
    intervals = torch.zeros(1, tokens, 1, 2, dtype=torch.int32, device=device)
    intervals[0, :, 0, 1] = torch.arange(1, tokens + 1, device=device)
    return AttentionMask(intervals, tokens)


def block_causal(
    chunks: Sequence[int], *, window: int | None = None, sink: int = 0, device: Device = "cpu"
) -> AttentionMask:
    """Chunk cq sees chunks ck <= cq, with a window those with ck > cq - window or ck < sink (also: diffusion forcing).

    Args:
        chunks: tokens of each chunk.
        window: number of latest chunks that are seen, the own one included; None is all of them.
        sink: number of first chunks that stay visible beside the window.
        device: where the mask lives.

    Raises:
        ValueError: no chunks, an empty chunk, window < 1 or sink < 0.
    """
    bounds = chunk_bounds(chunks, window, sink)
    ranges = [visible_chunks(bounds, chunk, chunk + 1, window, sink) for chunk in range(len(chunks))]
    return AttentionMask(repeat_rows(ranges, chunks, device), bounds[-1])


def teacher_forcing(
    chunks: Sequence[int],
    *,
    window: int | None = None,
    sink: int = 0,
    clean_is_constant: bool = False,
    device: Device = "cpu",
) -> AttentionMask:
    """Mask of a packed sequence [clean; noisy], both halves cut into the same chunks.

    A clean chunk sees clean chunks up to itself; a noisy chunk sees clean chunks strictly before it, and itself. Window
    and sink are those of `block_causal` and restrict what is seen of the clean half.

    Args:
        chunks: tokens of each chunk of one half.
        window: number of latest chunks that are seen, the own one included; None is all of them.
        sink: number of first chunks that stay visible beside the window.
        clean_is_constant: promise that tangents of the clean half are exactly zero. True in every layer of a network
            whose clean tokens have a constant time and no conditioning with a tangent.
        device: where the mask lives.

    Raises:
        ValueError: no chunks, an empty chunk, window < 1 or sink < 0.
    """
    bounds = chunk_bounds(chunks, window, sink)
    half = bounds[-1]
    ranges = [visible_chunks(bounds, chunk, chunk + 1, window, sink) for chunk in range(len(chunks))]
    for chunk in range(len(chunks)):
        own = (half + bounds[chunk], half + bounds[chunk + 1])
        ranges.append([*visible_chunks(bounds, chunk, chunk, window, sink), own])
    intervals = repeat_rows(ranges, [*chunks, *chunks], device)
    if not clean_is_constant:
        return AttentionMask(intervals, 2 * half)
    active = torch.arange(2 * half, device=device) >= half
    return AttentionMask(intervals, 2 * half, active, active)


def documents(lengths: Sequence[int], *, device: Device = "cpu") -> AttentionMask:
    """Documents packed one after the other, each of which sees itself alone.

    Raises:
        ValueError: a negative length.
    """
    check_lengths("lengths of documents", lengths, least=0)
    ends = list(itertools.accumulate(lengths))
    ranges = [[(end - length, end)] for length, end in zip(lengths, ends, strict=True)]
    return AttentionMask(repeat_rows(ranges, lengths, device), sum(lengths))


def lengths(key_lengths: Tensor, *, queries: int, keys: int, device: Device = "cpu") -> AttentionMask:
    """One mask per sample: all its queries see its first key_lengths[b] keys, as with padded text.

    Args:
        key_lengths: integers [B] from 0 to `keys`.
        queries: Nq.
        keys: Nk.
        device: where the mask lives.

    Raises:
        ValueError: not a list of integers, a length beyond the keys, or a negative number of tokens.
    """
    check_lengths("queries and keys", [queries, keys], least=0)
    if key_lengths.dtype not in INTEGERS or key_lengths.ndim != 1 or key_lengths.numel() == 0:
        raise ValueError(f"key_lengths is {key_lengths.dtype} {list(key_lengths.shape)}, but must be integers [batch].")
    if int(key_lengths.amin()) < 0 or int(key_lengths.amax()) > keys:
        raise ValueError(f"key_lengths is {key_lengths.tolist()}, but each must be from 0 to keys={keys}.")
    intervals = torch.zeros(len(key_lengths), queries, 1, 2, dtype=torch.int32, device=device)
    intervals[:, :, 0, 1] = key_lengths.to(device=device, dtype=torch.int32)[:, None]
    return AttentionMask(intervals, keys)


def from_predicate(
    predicate: Callable[[Tensor, Tensor], Tensor],
    queries: int,
    keys: int,
    *,
    max_intervals: int = 4,
    device: Device = "cpu",
) -> AttentionMask:
    """The mask of any rule, evaluated in blocks of queries: O(rows of a block * keys) memory.

    Args:
        predicate: called with query indices [n, 1] and key indices [1, Nk] (int64); gives bool [n, Nk], or what
            broadcasts to it. True is seen.
        queries: Nq.
        keys: Nk.
        max_intervals: the most ranges a query may need. Partial tiles compare each pair with all of them.
        device: where the mask lives and the predicate is evaluated.

    Raises:
        ValueError: a query needs more ranges, the result is of another kind, or a negative number of tokens.
    """
    check_lengths("queries and keys", [queries, keys], least=0)
    check_lengths("max_intervals", [max_intervals], least=1)
    columns = torch.arange(keys, device=device)[None]
    step = max(1, PREDICATE_BLOCK // max(1, keys))
    intervals = torch.zeros(1, queries, max_intervals, 2, dtype=torch.int32, device=device)
    for first in range(0, queries, step):
        rows = torch.arange(first, min(first + step, queries), device=device)[:, None]
        seen = predicate(rows, columns)
        shape = (len(rows), keys)
        fits = seen.ndim == 2 and all(n in (1, m) for n, m in zip(seen.shape, shape, strict=True))
        if seen.dtype != torch.bool or not fits:
            raise ValueError(
                f"The predicate gave {seen.dtype} {list(seen.shape)} for query indices {list(rows.shape)} and key "
                f"indices {list(columns.shape)}; it must give bool {list(shape)}."
            )
        write_runs(seen.expand(shape), first, intervals[0, first : first + step])
    used = (intervals[..., 1] > intervals[..., 0]).any(dim=1).sum()
    return AttentionMask(intervals[:, :, : max(1, int(used))].contiguous(), keys)


def intersect(a: AttentionMask, b: AttentionMask) -> AttentionMask:
    """Keys that both masks show. Promises of zero tangents hold from either: less is seen, so none is broken.

    Raises:
        ValueError: the masks differ in queries, keys or device, or are for different batches.
    """
    check_pair(a, b)
    mine, other = a.intervals.unsqueeze(3), b.intervals.unsqueeze(2)
    starts = torch.maximum(mine[..., 0], other[..., 0]).flatten(2)
    ends = torch.minimum(mine[..., 1], other[..., 1]).flatten(2)
    return AttentionMask(
        canonical_intervals(torch.stack((starts, ends), dim=-1)),
        a.keys,
        either_promise(a.query_active, b.query_active),
        either_promise(a.key_active, b.key_active),
        a.verify or b.verify,
    )


def unite(a: AttentionMask, b: AttentionMask) -> AttentionMask:
    """Keys that either mask shows. A promise of zero tangents stays where both make it.

    Raises:
        ValueError: the masks differ in queries, keys or device, or are for different batches.
    """
    check_pair(a, b)
    batch = max(a.batch, b.batch)
    ranges = torch.cat((a.intervals.expand(batch, -1, -1, -1), b.intervals.expand(batch, -1, -1, -1)), dim=2)
    return AttentionMask(
        canonical_intervals(ranges),
        a.keys,
        None if a.query_active is None or b.query_active is None else a.query_active | b.query_active,
        None if a.key_active is None or b.key_active is None else a.key_active | b.key_active,
        a.verify or b.verify,
    )


def check_pair(a: AttentionMask, b: AttentionMask) -> None:
    """Raise ValueError unless two masks can be combined."""
    if a.key_bias is not None or b.key_bias is not None:
        raise ValueError(
            "masks with a key bias are not combined; combine their ranges, and give the bias to the result."
        )
    same = (a.queries, a.keys, a.intervals.device) == (b.queries, b.keys, b.intervals.device)
    if not same or (a.batch != b.batch and 1 not in (a.batch, b.batch)):
        raise ValueError(f"{a} and {b} do not fit together; build both for the same tokens, batch and device.")
