"""Gradients of tiled attention from the saved log-sum-exp: scores are computed again, tile by tile.

`tiled_backward` is the gradient of the output alone (arXiv:2307.08691, Algorithm 2). `tiled_tangent_backward` is that
of output and tangent together. With cotangents dO of the output o, G of its tangent to, dL of the log-sum-exp, and

    Y = G V^T, X = dO V^T + G tV^T, C = tS - mean, eta = G . o, Delta = dO . o + G . to - dL

the scores S and their tangents tS receive dtS = P (Y - eta) and dS = P (X - Delta + (Y - eta) C), and the rest follows
from S = c q k^T, tS = c (tq k^T + q tk^T), o = P v, to = P tv + (P C) v.

Legend: h heads of a group, one per key head; i query rows of a tile (times the query heads that share a key head); w
keys of a run; D width of queries and keys, E width of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.kernels.attention_tiled import LOG2_E, bias_rows
from fewstep.kernels.attention_tiles import HeadGroup, QueryTile, Run, Scratch, head_groups, hide, tiling_of
from fewstep.kernels.mask import AttentionMask


@dataclass(frozen=True)
class Saved:
    """Inputs and results of a forward pass; `lse` [B, H, Nq] is what `tiled_forward` gave."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class SavedTangents:
    """Tangents of a forward pass, those of q, k, v as None where they were zero, and their results."""

    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    tangent: Tensor
    mean: Tensor


def tiled_backward(
    saved: Saved, grad_output: Tensor, grad_lse: Tensor | None, *, mask: AttentionMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, in their dtype.

    Args:
        saved: inputs and results of the forward pass.
        grad_output: cotangent of the output, [B, H, Nq, E].
        grad_lse: cotangent of the log-sum-exp, [B, H, Nq], or None for zero.
        mask: the mask of the forward pass.
        scale: the scale of the forward pass.
    """
    compute = saved.lse.dtype
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (saved.q, saved.k, saved.v)]
    tiling = tiling_of(mask)
    scratch, biases = Scratch(saved.lse), bias_rows(mask, saved.k)
    for group in head_groups(saved.q, saved.k, tiling, upcasts=saved.q.dtype != compute, buffers=2):
        k, v = group.keys_of(saved.k, compute), group.keys_of(saved.v, compute)
        bias = None if biases is None else group.keys_of(biases, compute)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for tile in tiling.tiles[group.mask]:
            row = gather_rows(group, tile, saved, grad_output, grad_lse)
            dq = torch.zeros_like(row.q)
            intervals = tiling.intervals[group.mask, tile.start : tile.stop]
            for run in tile.runs:
                part = slice(run.start, run.stop)
                p, ds = (
                    scratch.view(place, (row.q.shape[0], row.q.shape[1], run.stop - run.start)) for place in range(2)
                )
                weights(p, row.q * (scale * LOG2_E), k[:, part], row.lse, run, intervals, bias)
                dv[:, part].baddbmm_(p.transpose(1, 2), row.grad_output)
                torch.bmm(row.grad_output, v[:, part].transpose(1, 2), out=ds)
                ds.sub_(row.delta).mul_(p)
                dq.baddbmm_(ds, k[:, part])
                dk[:, part].baddbmm_(ds.transpose(1, 2), row.q)
            group.write_rows(grads[0], tile, dq.mul_(scale))
        group.write_keys(grads[1], dk.mul_(scale))
        group.write_keys(grads[2], dv)
    return grads[0], grads[1], grads[2]


@dataclass(frozen=True)
class Rows:
    """One query tile: q [h, i, D], grad_output [h, i, E], lse and delta [h, i, 1] in the dtype of the computation.

    `lse` is in units of log 2 and +inf for queries that see no key, which makes their weights 0.
    """

    q: Tensor
    grad_output: Tensor
    lse: Tensor
    delta: Tensor


def gather_rows(group: HeadGroup, tile: QueryTile, saved: Saved, grad_output: Tensor, grad_lse: Tensor | None) -> Rows:
    """Rows of one tile, with delta = dO . o - dL."""
    dtype = saved.lse.dtype
    d_output = group.rows_of(grad_output, tile, dtype)
    delta = (d_output * group.rows_of(saved.output, tile, dtype)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= group.rows_of(grad_lse.unsqueeze(-1), tile, dtype)
    lse = group.rows_of(saved.lse.unsqueeze(-1), tile, dtype) * LOG2_E
    return Rows(group.rows_of(saved.q, tile, dtype), d_output, lse.masked_fill_(lse == -math.inf, math.inf), delta)


def weights(
    p: Tensor, scaled_q: Tensor, k: Tensor, lse: Tensor, run: Run, intervals: Tensor, bias: Tensor | None
) -> None:
    """Write the softmax weights [h, i, w] of one run to `p`; `bias` [h, Nk, 1] is in units of log 2."""
    torch.bmm(scaled_q, k.transpose(1, 2), out=p)
    if bias is not None:
        p.add_(bias[:, run.start : run.stop].transpose(1, 2))
    if run.partial:
        hide(p, intervals, run)
    p.sub_(lse).exp2_()


def tiled_tangent_backward(
    saved: Saved,
    tangents: SavedTangents,
    grad_output: Tensor,
    grad_tangent: Tensor,
    grad_lse: Tensor | None,
    *,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and of tq, tk, tv (None where there was no tangent), contiguous, in their dtype.

    The mask's promises about zero tangents are not used: gradients with respect to them are not zero.

    Args:
        saved: inputs and results of the forward pass.
        tangents: their tangents.
        grad_output: cotangent of the output, [B, H, Nq, E].
        grad_tangent: cotangent of its tangent, [B, H, Nq, E].
        grad_lse: cotangent of the log-sum-exp, [B, H, Nq], or None for zero.
        mask: the mask of the forward pass.
        scale: the scale of the forward pass.
    """
    inputs = (saved.q, saved.k, saved.v, tangents.tq, tangents.tk, tangents.tv)
    grads = [None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    compute = saved.lse.dtype
    tiling = tiling_of(mask)
    scratch, biases = Scratch(saved.lse), bias_rows(mask, saved.k)
    for group in head_groups(saved.q, saved.k, tiling, upcasts=saved.q.dtype != compute, buffers=4):
        keys = KeySide.gather(group, saved, tangents)
        bias = None if biases is None else group.keys_of(biases, compute)
        for tile in tiling.tiles[group.mask]:
            row = gather_rows(group, tile, saved, grad_output, grad_lse)
            side = QuerySide.gather(group, tile, row, tangents, grad_tangent, saved)
            intervals = tiling.intervals[group.mask, tile.start : tile.stop]
            for run in tile.runs:
                views = [
                    scratch.view(place, (row.q.shape[0], row.q.shape[1], run.stop - run.start)) for place in range(4)
                ]
                part = keys.k[:, run.start : run.stop]
                weights(views[0], row.q * (scale * LOG2_E), part, row.lse, run, intervals, bias)
                accumulate(row, side, keys, run, views, scale)
            for target, rows_of_it in zip((grads[0], grads[3]), (side.dq, side.dtq), strict=True):
                if target is not None:
                    group.write_rows(target, tile, rows_of_it * scale)
        sums = ((1, keys.dk, scale), (2, keys.dv, 1.0), (4, keys.dtk, scale), (5, keys.dtv, 1.0))
        for place, total, factor in sums:
            target = grads[place]
            if target is not None:
                group.write_keys(target, total * factor)
    dq, dk, dv, dtq, dtk, dtv = grads
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return dq, dk, dv, dtq, dtk, dtv


@dataclass(frozen=True)
class KeySide:
    """Keys, values, tangents [h, Nk, D or E] of one group, and the sums that become their gradients."""

    k: Tensor
    v: Tensor
    tk: Tensor | None
    tv: Tensor | None
    dk: Tensor
    dv: Tensor
    dtk: Tensor
    dtv: Tensor

    @staticmethod
    def gather(group: HeadGroup, saved: Saved, tangents: SavedTangents) -> KeySide:
        dtype = saved.lse.dtype
        k, v = group.keys_of(saved.k, dtype), group.keys_of(saved.v, dtype)
        tk, tv = (None if x is None else group.keys_of(x, dtype) for x in (tangents.tk, tangents.tv))
        return KeySide(k, v, tk, tv, *(torch.zeros_like(x) for x in (k, v, k, v)))


@dataclass(frozen=True)
class QuerySide:
    """What one query tile adds to `Rows`: tq, G, mean, eta, the Delta of both cotangents, and sums for dq and dtq."""

    tq: Tensor | None
    grad_tangent: Tensor
    mean: Tensor
    eta: Tensor
    delta: Tensor
    dq: Tensor
    dtq: Tensor

    @staticmethod
    def gather(
        group: HeadGroup, tile: QueryTile, row: Rows, tangents: SavedTangents, grad_tangent: Tensor, saved: Saved
    ) -> QuerySide:
        dtype = saved.lse.dtype
        tq = None if tangents.tq is None else group.rows_of(tangents.tq, tile, dtype)
        g = group.rows_of(grad_tangent, tile, dtype)
        eta = (g * group.rows_of(saved.output, tile, dtype)).sum(-1, keepdim=True)
        delta = row.delta + (g * group.rows_of(tangents.tangent, tile, dtype)).sum(-1, keepdim=True)
        mean = group.rows_of(tangents.mean.unsqueeze(-1), tile, dtype)
        return QuerySide(tq, g, mean, eta, delta, torch.zeros_like(row.q), torch.zeros_like(row.q))


def accumulate(row: Rows, side: QuerySide, keys: KeySide, run: Run, views: list[Tensor], scale: float) -> None:
    """Add what one run of keys contributes to all sums; `views[0]` holds its weights P, the others are free."""
    part = slice(run.start, run.stop)
    p, c, x, y = views
    k, v = keys.k[:, part], keys.v[:, part]
    tk, tv = (None if t is None else t[:, part] for t in (keys.tk, keys.tv))
    c.copy_(side.mean.expand_as(c)).neg_()
    if side.tq is not None:
        c.baddbmm_(side.tq, k.transpose(1, 2), alpha=scale)
    if tk is not None:
        c.baddbmm_(row.q, tk.transpose(1, 2), alpha=scale)
    torch.bmm(row.grad_output, v.transpose(1, 2), out=x)
    if tv is not None:
        x.baddbmm_(side.grad_tangent, tv.transpose(1, 2))
    torch.bmm(side.grad_tangent, v.transpose(1, 2), out=y).sub_(side.eta)
    keys.dv[:, part].baddbmm_(p.transpose(1, 2), row.grad_output).baddbmm_((p * c).transpose(1, 2), side.grad_tangent)
    keys.dtv[:, part].baddbmm_(p.transpose(1, 2), side.grad_tangent)
    ds = x.sub_(side.delta).addcmul_(y, c).mul_(p)
    dts = y.mul_(p)
    side.dq.baddbmm_(ds, k)
    side.dtq.baddbmm_(dts, k)
    keys.dk[:, part].baddbmm_(ds.transpose(1, 2), row.q)
    keys.dtk[:, part].baddbmm_(dts.transpose(1, 2), row.q)
    if tk is not None:
        side.dq.baddbmm_(dts, tk)
    if side.tq is not None:
        keys.dk[:, part].baddbmm_(dts.transpose(1, 2), side.tq)
