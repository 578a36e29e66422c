"""Triton kernels of the gradient of attention with respect to queries, keys and values; tangents never enter.

With P = exp(S - lse), D_i = do_i . o_i - dlse_i and dS = P o (do v^T - D),

    dq = scale dS k;  dk = scale dS^T q;  dv = P^T do.

One kernel owns a query tile and sums dq over the key tiles that its schedule lists; another owns a key tile and sums dk
and dv over query tiles and over the query heads that share its key head. Both compute P again, which costs two matrix
products more than one kernel with atomic sums would, and makes results bitwise the same on each call with one size of
tiles.

Legend: as in `fewstep.kernels.attention_jvp_triton`.
"""

# No `from __future__ import annotations` here: Triton reads tl.constexpr from the annotations.
# Kernels are Triton's language and not Python's: plain numbers are passed as tl.constexpr, launches take more options
# than the kernel has parameters, and static_range is a loop.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.attention_checks import check_inputs
from fewstep.kernels.attention_launch_triton import (
    LENGTHS,
    LOG2_E,
    bias_of,
    check_supported,
    padded,
    prepare_mask,
    scale_of,
    strides_of,
    switches_of,
    tune_key,
    upcast,
    with_unit_stride,
)
from fewstep.kernels.attention_tiles_triton import (
    NOWHERE,
    dot,
    load_bias,
    load_rows,
    narrow,
    place_of,
    sees,
    short_place,
    store_rows,
)
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.tuning.choice_triton import choose
from fewstep.kernels.tuning.table import TileConfig

DELTA_ROWS = 32


@triton.jit(do_not_specialize=LENGTHS)
def delta_kernel(
    OUT, DO, LSE, DLSE, DELTA, o_batch, o_head, o_stride, do_batch, do_head, do_stride, heads, queries, query_tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """D of a few rows, 0 where a query sees no key: its log-sum-exp is a constant."""
    program = tl.program_id(0)
    row = program // query_tiles
    first = (program % query_tiles) * ROWS
    batch = (row // heads).to(tl.int64)
    head = (row % heads).to(tl.int64)
    o = load_rows(OUT + batch * o_batch + head * o_head, first, queries, o_stride, ROWS, E, E_PAD, True)
    do = load_rows(DO + batch * do_batch + head * do_head, first, queries, do_stride, ROWS, E, E_PAD, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    rows = first + tl.arange(0, ROWS)
    place = row.to(tl.int64) * queries + rows
    inside = rows < queries
    if HAS_DLSE:
        delta = delta - tl.load(DLSE + place, mask=inside, other=0.0)
        lse = tl.load(LSE + place, mask=inside, other=0.0)
        delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(DELTA + place, delta, mask=inside)


@triton.jit
def load_lse(lse, rows, queries):
    """Log-sum-exp in units of log 2, +inf for queries that see no key or do not exist: their weights become zero."""
    values = tl.load(lse + rows, mask=rows < queries, other=float("inf"))
    return tl.where(values == float("-inf"), float("inf"), values) * 1.4426950408889634


@triton.jit
def walk_keys(
    q, do, lse, delta, dq, begin, end, partial_begin, short, first_query,
    K, V, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, queries, keys, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dq / scale plus what one list of key tiles adds to it."""
    for i in range(begin, end):
        first = tl.load(ROW_TILES + place_of(i, partial_begin, short, MASKED)) * BN
        k = load_rows(K, first, keys, k_stride, BN, D, D_PAD, MASKED)
        v = load_rows(V, first, keys, v_stride, BN, E, E_PAD, MASKED)
        s = dot(q, tl.trans(k), None, UPCAST) * scale_log2
        if BIASED:
            s = s + load_bias(BIAS, first, keys, BN)[None, :]
        if MASKED:
            s = tl.where(sees(INTERVALS, first_query, first, queries, RANGES, BM, BN), s, float("-inf"))
        p = tl.exp2(s - lse[:, None])
        ds = p * (dot(do, tl.trans(v), None, UPCAST) - delta[:, None])
        dq = dot(narrow(ds, k.dtype, UPCAST), k, dq, UPCAST)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, BIAS, INTERVALS, ROW_PTR, ROW_TILES, ROW_ORDER,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, do_batch, do_head, do_stride,
    heads, group, queries, keys, query_tiles, key_tiles, mask_step, bias_step, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dq of one query tile of one head."""
    program = tl.program_id(0)
    row = program // query_tiles
    batch = row // heads
    head = row % heads
    mask_rows = batch * mask_step * query_tiles
    tile = tl.load(ROW_ORDER + mask_rows + program % query_tiles)
    pointers = ROW_PTR + (mask_rows + tile) * 4
    first = tile * BM
    INTERVALS += (batch * mask_step).to(tl.int64) * queries * (2 * RANGES)
    batch = batch.to(tl.int64)
    BIAS += batch * bias_step
    head = head.to(tl.int64)
    key_head = head // group
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + key_head * k_head
    V += batch * v_batch + key_head * v_head
    DO += batch * do_batch + head * do_head
    place = row.to(tl.int64) * queries
    rows = first + tl.arange(0, BM)
    q = load_rows(Q, first, queries, q_stride, BM, D, D_PAD, True)
    do = load_rows(DO, first, queries, do_stride, BM, E, E_PAD, True)
    lse = load_lse(LSE + place, rows, queries)
    delta = tl.load(DELTA + place + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros([BM, D_PAD], tl.float32)
    p0 = tl.load(pointers)
    p1 = tl.load(pointers + 1)
    p2 = tl.load(pointers + 2)
    p4 = tl.load(pointers + 4)
    short_tile = tl.where(keys % BN != 0, key_tiles - 1, -1)
    short = tl.minimum(short_place(ROW_TILES, p0, p1, short_tile), short_place(ROW_TILES, p1, p2, short_tile))
    moved = (short != NOWHERE).to(tl.int32)
    dq = walk_keys(
        q, do, lse, delta, dq, p0, p2 - moved, p2, short, first, K, V, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride,
        queries, keys, scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, False, BIASED,
    )  # fmt: skip
    if MASKED:
        dq = walk_keys(
            q, do, lse, delta, dq, p2 - moved, p4, p2, short, first, K, V, BIAS, INTERVALS, ROW_TILES, k_stride,
            v_stride, queries, keys, scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, True, BIASED,
        )  # fmt: skip
    store_rows(DQ + place * D, dq * scale, first, queries, BM, D, D_PAD, UPCAST)


@triton.jit
def walk_queries(
    k, v, bias, dk, dv, begin, end, partial_begin, short, first_key,
    Q, DO, LSE, DELTA, INTERVALS, COLUMN_TILES, q_stride, do_stride, queries, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv plus what one list of query tiles of one head adds to them; scores are [BN, BM] here."""
    for i in range(begin, end):
        first = tl.load(COLUMN_TILES + place_of(i, partial_begin, short, MASKED)) * BM
        rows = first + tl.arange(0, BM)
        q = load_rows(Q, first, queries, q_stride, BM, D, D_PAD, MASKED)
        do = load_rows(DO, first, queries, do_stride, BM, E, E_PAD, MASKED)
        lse = load_lse(LSE, rows, queries)
        delta = tl.load(DELTA + rows, mask=rows < queries, other=0.0)
        s = dot(k, tl.trans(q), None, UPCAST) * scale_log2
        if BIASED:
            s = s + bias[:, None]
        if MASKED:
            seen = tl.trans(sees(INTERVALS, first, first_key, queries, RANGES, BM, BN))
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s - lse[None, :])
        dv = dot(narrow(p, do.dtype, UPCAST), do, dv, UPCAST)
        ds = p * (dot(v, tl.trans(do), None, UPCAST) - delta[None, :])
        dk = dot(narrow(ds, q.dtype, UPCAST), q, dk, UPCAST)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, BIAS, INTERVALS, COLUMN_PTR, COLUMN_TILES, COLUMN_ORDER,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride, do_batch, do_head, do_stride,
    heads, group, queries, keys, query_tiles, key_tiles, mask_step, bias_step, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one key tile of one key head."""
    program = tl.program_id(0)
    row = program // key_tiles
    key_heads = heads // group
    batch = row // key_heads
    key_head = row % key_heads
    mask_columns = batch * mask_step * key_tiles
    tile = tl.load(COLUMN_ORDER + mask_columns + program % key_tiles)
    pointers = COLUMN_PTR + (mask_columns + tile) * 4
    first = tile * BN
    INTERVALS += (batch * mask_step).to(tl.int64) * queries * (2 * RANGES)
    lines = (batch * heads + key_head * group).to(tl.int64)
    batch = batch.to(tl.int64)
    BIAS += batch * bias_step
    key_head = key_head.to(tl.int64)
    Q += batch * q_batch + key_head * group * q_head
    DO += batch * do_batch + key_head * group * do_head
    LSE += lines * queries
    DELTA += lines * queries
    k = load_rows(K + batch * k_batch + key_head * k_head, first, keys, k_stride, BN, D, D_PAD, True)
    v = load_rows(V + batch * v_batch + key_head * v_head, first, keys, v_stride, BN, E, E_PAD, True)
    bias = load_bias(BIAS, first, keys, BN) if BIASED else 0.0
    dk = tl.zeros([BN, D_PAD], tl.float32)
    dv = tl.zeros([BN, E_PAD], tl.float32)
    p0 = tl.load(pointers)
    p1 = tl.load(pointers + 1)
    p2 = tl.load(pointers + 2)
    p4 = tl.load(pointers + 4)
    short_tile = tl.where(queries % BM != 0, query_tiles - 1, -1)
    short = tl.minimum(short_place(COLUMN_TILES, p0, p1, short_tile), short_place(COLUMN_TILES, p1, p2, short_tile))
    moved = (short != NOWHERE).to(tl.int32)
    for _ in range(0, group):
        dk, dv = walk_queries(
            k, v, bias, dk, dv, p0, p2 - moved, p2, short, first, Q, DO, LSE, DELTA, INTERVALS, COLUMN_TILES,
            q_stride, do_stride, queries, scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, False, BIASED,
        )  # fmt: skip
        if MASKED:
            dk, dv = walk_queries(
                k, v, bias, dk, dv, p2 - moved, p4, p2, short, first, Q, DO, LSE, DELTA, INTERVALS, COLUMN_TILES,
                q_stride, do_stride, queries, scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, True, BIASED,
            )  # fmt: skip
        Q += q_head
        DO += do_head
        LSE += queries
        DELTA += queries
    place = row.to(tl.int64) * keys
    store_rows(DK + place * D, dk * scale, first, keys, BN, D, D_PAD, UPCAST)
    store_rows(DV + place * E, dv, first, keys, BN, E, E_PAD, UPCAST)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None, *,
    mask: AttentionMask | None = None, scale: float | None = None, config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in their dtype, contiguous; 0 for queries that see no key and for keys nobody sees.

    Args:
        q: [B, H, Nq, D] as in `attention_forward`, likewise k [B, G, Nk, D], v [B, G, Nk, E], mask, scale, config.
        o: the forward pass's output, [B, H, Nq, E].
        lse: its log-sum-exp, [B, H, Nq] in fp32.
        grad_output: cotangent of the output, in the dtype of q.
        grad_lse: cotangent of the log-sum-exp, [B, H, Nq], or None for zero; not read where a query sees no key.

    Raises:
        ValueError: as `attention_forward`, or results and cotangents do not fit q, k and v.
    """
    check_inputs(q, k, v, mask)
    check_supported(q, v)
    check_saved(q, v, o, lse, grad_output, grad_lse)
    mask = prepare_mask(mask, q, k)
    q, k, v, o, do = (with_unit_stride(x) for x in (q, k, v, o, grad_output))
    lse = lse.contiguous()
    dlse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    batch, heads, queries, width = q.shape
    value_width = v.shape[-1]
    factor, (bias, bias_step, is_biased) = scale_of(q, scale), bias_of(mask, lse)

    def arguments(tiles: TileConfig) -> tuple[int | float, ...]:
        """Strides, lengths and scales, the same for both kernels."""
        return (
            *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(do), heads, heads // k.shape[1], queries,
            mask.keys, triton.cdiv(queries, tiles.query_tile), triton.cdiv(mask.keys, tiles.key_tile),
            int(mask.batch > 1), bias_step, factor, factor * LOG2_E,
        )  # fmt: skip

    def launch_dq(tiles: TileConfig) -> None:
        schedule = mask.schedule(tiles.query_tile, tiles.key_tile)
        dq_kernel[(triton.cdiv(queries, tiles.query_tile) * batch * heads,)](
            q, k, v, do, lse, delta, dq, bias, mask.intervals, schedule.row_ptr, schedule.row_tiles, schedule.row_order,
            *arguments(tiles), D=width, E=value_width, D_PAD=padded(width), E_PAD=padded(value_width),
            RANGES=mask.intervals.shape[2], BM=tiles.query_tile, BN=tiles.key_tile, UPCAST=upcast(q.dtype),
            MASKED=switches_of(mask, tiles).masked, BIASED=is_biased, num_warps=tiles.warps, num_stages=tiles.stages,
            enable_fp_fusion=True,
        )  # fmt: skip

    def launch_dkdv(tiles: TileConfig) -> None:
        schedule = mask.schedule(tiles.query_tile, tiles.key_tile)
        dkdv_kernel[(triton.cdiv(mask.keys, tiles.key_tile) * batch * k.shape[1],)](
            q, k, v, do, lse, delta, dk, dv, bias, mask.intervals, schedule.column_ptr, schedule.column_tiles,
            schedule.column_order, *arguments(tiles), D=width, E=value_width, D_PAD=padded(width),
            E_PAD=padded(value_width), RANGES=mask.intervals.shape[2], BM=tiles.query_tile, BN=tiles.key_tile,
            UPCAST=upcast(q.dtype), MASKED=switches_of(mask, tiles).masked, BIASED=is_biased, num_warps=tiles.warps,
            num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        if lse.numel() > 0:
            blocks = triton.cdiv(queries, DELTA_ROWS)
            delta_kernel[(blocks * batch * heads,)](
                o, do, lse, lse if dlse is None else dlse, delta, *strides_of(o), *strides_of(do), heads, queries,
                blocks, E=value_width, E_PAD=padded(value_width), ROWS=DELTA_ROWS, HAS_DLSE=dlse is not None,
            )  # fmt: skip
            launch_dq(config or choose(tune_key("dq", q, v, mask, ()), launch_dq))
        if batch * k.shape[1] * mask.keys > 0:
            launch_dkdv(config or choose(tune_key("dkdv", q, v, mask, (heads > k.shape[1],)), launch_dkdv))
    return dq, dk, dv


def check_saved(
    q: Tensor, v: Tensor, o: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None
) -> None:  # fmt: skip
    """Raise ValueError unless results of the forward pass and cotangents fit the inputs."""
    rows = q.shape[:3]
    shape = (*rows, v.shape[-1])
    for name, x in (("o", o), ("grad_output", grad_output)):
        if x.shape != shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; it must be {q.dtype} {tuple(shape)} on "
                f"{q.device}, like the output of the forward pass. Cast or expand it."
            )
    for name, x in (("lse", lse), ("grad_lse", grad_lse)):
        if x is not None and (x.shape != rows or x.device != q.device):
            raise ValueError(
                f"{name} is {tuple(x.shape)} on {x.device}; it must be {tuple(rows)} on {q.device}, like the "
                "log-sum-exp of the forward pass; expand it."
            )
    if lse.dtype != torch.float32:
        raise ValueError(f"lse is {lse.dtype}; pass the fp32 log-sum-exp of the forward pass as it is.")
