"""Attention and its tangent in plain torch, tile by tile: no buffer of queries x keys, no work for empty tiles.

It runs wherever torch does and is the path of the CPU. Online softmax carries for each query the maximum m and the sum
l of its weights, the weighted sum O of values, and, where tangents are active, the mean of the score tangents and the
sum T of tangent contributions centred on that mean. A centred T has no large part that cancels at the end, however
large the part of the score tangents that all keys share (a time embedding adds such a part to every token).

Where a tangent is zero its matrix products are not done: a query tile without active runs costs a plain forward, a run
with one active side two products less than one with both.

Legend: h heads of a group, one per key head; i query rows of a tile (times the query heads that share a key head); w
keys of a run; D width of queries and keys, E width of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.kernels.attention_tiles import (
    HeadGroup,
    QueryTile,
    Run,
    Scratch,
    head_groups,
    hide,
    tiling_of,
)
from fewstep.kernels.mask import AttentionMask

LN2 = math.log(2.0)
LOG2_E = 1.0 / LN2
# Places in the scratch memory of a call.
Q_SCORES, Q_ROWS, TQ_ROWS, O_ROWS, T_ROWS, SCORES = range(6)


@dataclass(frozen=True)
class Keys:
    """Transposed keys [h, D, Nk] and values [h, Nk, E] of a group with their tangents, in the computation's dtype.

    `bias` [h, 1, Nk] of the scores is in units of log 2.
    """

    k: Tensor
    v: Tensor
    tk: Tensor | None
    tv: Tensor | None
    bias: Tensor | None

    @staticmethod
    def gather(group: HeadGroup, sources: tuple[Tensor | None, ...], dtype: torch.dtype, bias: Tensor | None) -> Keys:
        """Keys of one group out of (k, v, tk, tv) and the bias of `bias_rows`."""
        k, v, tk, tv = (None if x is None else group.keys_of(x, dtype) for x in sources)
        assert k is not None
        assert v is not None
        row = None if bias is None else group.keys_of(bias, dtype).transpose(1, 2)
        return Keys(k.transpose(1, 2), v, None if tk is None else tk.transpose(1, 2), tv, row)


@dataclass(frozen=True)
class Queries:
    """Queries of a tile and their tangents, [h, i, D], times the scale; `for_scores` in units of log 2."""

    for_scores: Tensor
    for_tk: Tensor | None
    for_tq: Tensor | None

    def score_tangents(self, keys: Keys, run: Run, out: Tensor) -> bool:
        """Write the score tangents [h, i, w] of a run to `out`; False, and nothing written, where they are zero."""
        part = slice(run.start, run.stop)
        if self.for_tq is not None:
            torch.bmm(self.for_tq, keys.k[:, :, part], out=out)
        if not run.active or self.for_tk is None or keys.tk is None:
            return self.for_tq is not None
        if self.for_tq is None:
            torch.bmm(self.for_tk, keys.tk[:, :, part], out=out)
        else:
            out.baddbmm_(self.for_tk, keys.tk[:, :, part])
        return True


@dataclass
class RowState:
    """What the runs seen so far left behind: m, l, mean [h, i, 1] and O, T [h, i, E].

    m is in units of log 2; -inf is a query that has seen no key yet. `mean` is None as long as it is zero, and T is
    meaningless until `has_t`.
    """

    m: Tensor
    l: Tensor  # noqa: E741 - its name in the papers
    o: Tensor
    t: Tensor
    mean: Tensor | None = None
    has_t: bool = False
    started: bool = False

    def add_to_t(self, left: Tensor, right: Tensor) -> None:
        """T += left right, where the first product of a tile needs no T that is set to zero before."""
        if self.has_t:
            self.t.baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=self.t)
        self.has_t = True


def tiled_forward(q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, Nq, E] in the dtype of q, and log-sum-exp [B, H, Nq] in fp32 (fp64 for fp64 inputs)."""
    output, lse, _, _ = tiled_forward_jvp(q, k, v, None, None, None, mask=mask, scale=scale)
    return output, lse


def tiled_forward_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, tangent of the output, tangent of the log-sum-exp.

    Args:
        q: [B, H, Nq, D]. k: [B, G, Nk, D] with G a divisor of H. v: [B, G, Nk, E]. One floating dtype, any strides.
        tq: tangent of q, None where it is zero; likewise tk and tv. With three Nones the tangents come back empty.
        mask: which keys each query sees, and where tangents are promised to be zero.
        scale: factor of the scores.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    active = not (tq is None and tk is None and tv is None)
    output = q.new_empty((*q.shape[:3], v.shape[-1]))
    lse = q.new_empty(q.shape[:3], dtype=compute)
    tangent = output.new_empty(output.shape if active else 0)
    mean = lse.new_empty(lse.shape if active else 0)
    tiling = tiling_of(mask)
    buffers = 2 if active else 1
    scratch, bias = Scratch(lse), bias_rows(mask, k)
    for group in head_groups(q, k, tiling, upcasts=q.dtype != compute, buffers=buffers):
        keys = Keys.gather(group, (k, v, tk, tv), compute, bias)
        for tile in tiling.tiles[group.mask]:
            queries = gather_queries(group, tile, q, tq, keys, scratch, scale)
            intervals = tiling.intervals[group.mask, tile.start : tile.stop]
            state = attend(queries, keys, tile, intervals, scratch, buffers)
            write(group, tile, state, output, lse)
            if active:
                write_tangents(group, tile, state, tangent, mean)
    return output, lse, tangent, mean


def bias_rows(mask: AttentionMask, k: Tensor) -> Tensor | None:
    """The mask's key bias in units of log 2, as [B, G, Nk, 1] beside keys [B, G, Nk, D]; None where it has none."""
    if mask.key_bias is None:
        return None
    compute = torch.float64 if k.dtype == torch.float64 else torch.float32
    return (mask.key_bias.to(compute) * LOG2_E)[:, None, :, None].expand(*k.shape[:3], 1)


def gather_queries(
    group: HeadGroup, tile: QueryTile, q: Tensor, tq: Tensor | None, keys: Keys, scratch: Scratch, scale: float
) -> Queries:
    """Scaled queries of one tile, and the left sides of its score tangents."""
    shape = (len(keys.v), (tile.stop - tile.start) * group.repeat, q.shape[3])
    for_scores = group.read_rows(q, tile, scratch.view(Q_SCORES, shape)).mul_(scale * LOG2_E)
    for_tq = for_tk = None
    if tq is not None and tile.active:
        for_tq = group.read_rows(tq, tile, scratch.view(TQ_ROWS, shape)).mul_(scale)
    if keys.tk is not None and any(run.active for run in tile.runs):
        for_tk = group.read_rows(q, tile, scratch.view(Q_ROWS, shape)).mul_(scale)
    return Queries(for_scores, for_tk, for_tq)


def attend(
    queries: Queries, keys: Keys, tile: QueryTile, intervals: Tensor, scratch: Scratch, buffers: int
) -> RowState:
    """Online softmax of one query tile over its runs; `intervals` [queries, R, 2] are the key ranges of its rows.

    `buffers` is 2 where score tangents are needed, else 1.
    """
    heads, rows = queries.for_scores.shape[:2]
    column = queries.for_scores.new_zeros((heads, rows, 1))
    sums = [scratch.view(place, (heads, rows, keys.v.shape[-1])) for place in (O_ROWS, T_ROWS)]
    state = RowState(column - math.inf, column, sums[0].zero_(), sums[1])
    for run in tile.runs:
        shape = (heads, rows, run.stop - run.start)
        views = [scratch.view(SCORES + place, shape) for place in range(buffers)]
        torch.bmm(queries.for_scores, keys.k[:, :, run.start : run.stop], out=views[0])
        if keys.bias is not None:
            views[0].add_(keys.bias[:, :, run.start : run.stop])
        if run.partial:
            hide(views[0], intervals, run)
        absorb(state, queries, keys, run, views)
    return state


def absorb(state: RowState, queries: Queries, keys: Keys, run: Run, views: list[Tensor]) -> None:
    """One step of online softmax with the running mean of score tangents; `views[0]` holds the scores of the run.

    With u = tS - mean for the mean so far, the new mean is mean + d, d = sum(p u) / l, and moving the centre of T from
    the old mean to the new one subtracts d O.
    """
    p = views[0]
    m = torch.maximum(state.m, p.amax(-1, keepdim=True))
    # A query that sees no key yet has m = -inf, and -inf - (-inf) is no number.
    safe = m.masked_fill(m == -math.inf, 0.0) if run.partial else m
    decay = (state.m - safe).exp2_()
    p.sub_(safe).exp2_()
    fresh = p.sum(-1, keepdim=True)
    l = torch.addcmul(fresh, state.l, decay)  # noqa: E741
    weight = l.masked_fill(l == 0, 1.0) if run.partial else l
    v, tv = keys.v[:, run.start : run.stop], keys.tv if run.active else None
    state.o.mul_(decay)
    if state.has_t:
        state.t.mul_(decay)
    shift = centre = None
    if len(views) > 1 and queries.score_tangents(keys, run, views[1]):
        if state.mean is None:
            state.mean = torch.zeros_like(m) if state.started else first_mean(p, views[1], weight, run)
        h = views[1].sub_(state.mean).mul_(p)
        shift = centre = h.sum(-1, keepdim=True) / weight
        state.add_to_t(h, v)
    elif state.mean is not None:
        # No score tangent here, so u = -mean for all keys: the products with p and with v are those of l and O.
        shift = -state.mean * (fresh / weight)
        centre = state.mean + shift
        state.t.addcmul_(state.o, state.mean)
    if tv is not None:
        state.add_to_t(p, tv[:, run.start : run.stop])
    state.o.baddbmm_(p, v)
    if shift is not None and centre is not None and state.mean is not None:
        state.t.addcmul_(state.o, centre, value=-1.0)
        state.mean = state.mean + shift
    state.m, state.l, state.started = m, l, True


def first_mean(p: Tensor, tangents: Tensor, weight: Tensor, run: Run) -> Tensor:
    """A mean [h, i, 1] to start from: without weight so far any is right, and one near the true mean moves little.

    Hidden keys must not enter: a query whose own score tangents are all zero keeps a tangent of exactly zero.
    """
    if run.partial:
        return (p * tangents).sum(-1, keepdim=True) / weight
    return tangents.mean(-1, keepdim=True)


def write(group: HeadGroup, tile: QueryTile, state: RowState, output: Tensor, lse: Tensor) -> None:
    """Normalise the output; a query that sees no key gets 0 and the log-sum-exp -inf."""
    empty = state.l == 0
    group.write_rows(output, tile, state.o.div_(state.l.masked_fill(empty, 1.0)))
    log_sum = state.m.masked_fill(empty, 0.0).add_(state.l.log2()).mul_(LN2)
    group.write_rows(lse, tile, log_sum.squeeze(-1))


def write_tangents(group: HeadGroup, tile: QueryTile, state: RowState, tangent: Tensor, mean: Tensor) -> None:
    """Normalise the tangent; both are exactly 0 where no run brought a tangent and for queries that see no key."""
    empty = state.l == 0
    t = state.t.div_(state.l.masked_fill(empty, 1.0)) if state.has_t else state.t.zero_()
    centre = torch.zeros_like(state.l) if state.mean is None else state.mean.masked_fill(empty, 0.0)
    group.write_rows(tangent, tile, t)
    group.write_rows(mean, tile, centre.squeeze(-1))
