"""Triton kernel of attention and its tangent: one pass over the keys, interval masks, no work for zero tangents.

A program owns one query tile of one head and walks the key tiles that the mask's schedule lists for it. It carries for
each query the maximum m and the sum l of its weights, the mean of its score tangents, the weighted sum O of values, and
the sum T of tangent contributions centred on that mean. With u = tS - mean and d = sum(p u) / l over a tile,

    mean += d;  T = a T - d a O + sum((p (u - d)) v) + sum(p tv);  O = a O + sum(p v),

where a rescales for a new maximum. A centred T has no large part that cancels at the end. Tangents of a key tile whose
keys and queries are promised to have none are zero, but the mean need not be: there u = -mean, and the products with v
are those of O, so that only vectors are updated (`rank one` below).

No program writes where another one does, so results are bitwise the same on each call with the same tiles.

Legend: B batch, H query heads, G key heads, Nq queries, Nk keys, D width of queries and keys, E width of values; BM, BN
queries and keys of a tile. Scores are kept in units of log 2.
"""

# No `from __future__ import annotations` here: Triton reads tl.constexpr from the annotations.
# Kernels are Triton's language and not Python's: plain numbers are passed as tl.constexpr, launches take more options
# than the kernel has parameters, and static_range is a loop.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.attention_checks import check_inputs, check_tangents
from fewstep.kernels.attention_launch_triton import (
    ACTIVE,
    CONSTANT,
    KEYS,
    LENGTHS,
    LOG2_E,
    PLAIN,
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

LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def score_tangents(
    q, tq, k, TK, first, keys, tk_stride, BN: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    UPCAST: tl.constexpr, MASKED: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TK: tl.constexpr,
):  # fmt: skip
    """tq k^T + q tk^T of one tile without the scale, in fp32; None where both are zero."""
    u = None
    if WITH_TQ:
        u = dot(tq, tl.trans(k), None, UPCAST)
    if WITH_TK:
        tk = load_rows(TK, first, keys, tk_stride, BN, D, D_PAD, MASKED)
        u = dot(q, tl.trans(tk), u, UPCAST)
    return u


@triton.jit
def walk_forward(
    q, tq, m, mass, mean, o, t, begin, end, partial_begin, short, first_query,
    K, V, TK, TV, BIAS, INTERVALS, ROW_TILES,
    k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    EARLY: tl.constexpr,
    TANGENT: tl.constexpr, SCORES: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TK: tl.constexpr, WITH_TV: tl.constexpr,
):  # fmt: skip
    """Online softmax over one list of key tiles of one kind; returns m, mass, mean, o, t.

    TANGENT: t is carried; SCORES: some tile of this query tile may have score tangents, so the mean is carried as well.
    WITH_TQ, WITH_TK, WITH_TV: which tangents are other than zero in the tiles of this list. EARLY: score tangents are
    taken before the scores, which holds fewer numbers in registers where matrix units read their operands from there.
    """
    for i in range(begin, end):
        first = tl.load(ROW_TILES + place_of(i, partial_begin, short, MASKED)) * BN
        k = load_rows(K, first, keys, k_stride, BN, D, D_PAD, MASKED)
        u = None
        if EARLY:
            u = score_tangents(q, tq, k, TK, first, keys, tk_stride, BN, D, D_PAD, UPCAST, MASKED, WITH_TQ, WITH_TK)
        s = dot(q, tl.trans(k), None, UPCAST) * scale_log2
        if BIASED:
            s = s + load_bias(BIAS, first, keys, BN)[None, :]
        if MASKED:
            s = tl.where(sees(INTERVALS, first_query, first, queries, RANGES, BM, BN), s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        # A query that sees no key yet has top = -inf, and -inf - (-inf) is no number.
        safe = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
        decay = tl.exp2(m - safe)
        p = tl.exp2(s - safe[:, None])
        fresh = tl.sum(p, 1)
        mass = mass * decay + fresh
        m = top
        v = load_rows(V, first, keys, v_stride, BN, E, E_PAD, MASKED)
        weights = narrow(p, v.dtype, UPCAST)
        o = o * decay[:, None]
        if TANGENT:
            t = t * decay[:, None]
        if WITH_TQ or WITH_TK:
            if not EARLY:
                u = score_tangents(q, tq, k, TK, first, keys, tk_stride, BN, D, D_PAD, UPCAST, MASKED, WITH_TQ, WITH_TK)
            u = u * scale - mean[:, None]
            d = tl.sum(p * u, 1) / (tl.where(mass == 0, 1.0, mass) if MASKED else mass)
            mean = mean + d
            t = t - d[:, None] * o
            t = dot(narrow(p * (u - d[:, None]), v.dtype, UPCAST), v, t, UPCAST)
        elif SCORES:
            # Rank one: u = -mean everywhere.
            t = t + mean[:, None] * o
            mean = mean * (1.0 - fresh / (tl.where(mass == 0, 1.0, mass) if MASKED else mass))
        if WITH_TV:
            tv = load_rows(TV, first, keys, tv_stride, BN, E, E_PAD, MASKED)
            t = dot(weights, tv, t, UPCAST)
        o = dot(weights, v, o, UPCAST)
        if SCORES and not (WITH_TQ or WITH_TK):
            t = t - mean[:, None] * o
    return m, mass, mean, o, t


@triton.jit
def walk_both(
    q, tq, m, mass, mean, o, t, full_begin, full_end, partial_begin, partial_end, short, first_query,
    K, V, TK, TV, BIAS, INTERVALS, ROW_TILES,
    k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    EARLY: tl.constexpr,
    TANGENT: tl.constexpr, SCORES: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TK: tl.constexpr, WITH_TV: tl.constexpr,
):  # fmt: skip
    """`walk_forward` over the full and, if the mask has any, the partial tiles of one kind of tangents."""
    moved = (short != NOWHERE).to(tl.int32)
    m, mass, mean, o, t = walk_forward(
        q, tq, m, mass, mean, o, t, full_begin, full_end - moved, partial_begin, short, first_query,
        K, V, TK, TV, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
        scale_log2,
        D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, False, BIASED, EARLY, TANGENT, SCORES, WITH_TQ, WITH_TK, WITH_TV,
    )  # fmt: skip
    if MASKED:
        m, mass, mean, o, t = walk_forward(
            q, tq, m, mass, mean, o, t, partial_begin - moved, partial_end, partial_begin, short, first_query,
            K, V, TK, TV, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, True, BIASED, EARLY, TANGENT, SCORES, WITH_TQ,
            WITH_TK, WITH_TV,
        )  # fmt: skip
    return m, mass, mean, o, t


@triton.jit
def walk_row(
    q, tq, m, mass, mean, o, t, pointers, short_tile, first_query,
    K, V, TK, TV, BIAS, INTERVALS, ROW_TILES,
    k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    EARLY: tl.constexpr,
    TANGENT: tl.constexpr, SPLIT: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """All tiles of one query tile. SPLIT: tiles of keys without tangents are walked apart from those with."""
    p0 = tl.load(pointers)
    p1 = tl.load(pointers + 1)
    p2 = tl.load(pointers + 2)
    p3 = tl.load(pointers + 3)
    p4 = tl.load(pointers + 4)
    active_short = short_place(ROW_TILES, p0, p1, short_tile)
    constant_short = short_place(ROW_TILES, p1, p2, short_tile)
    if SPLIT:
        m, mass, mean, o, t = walk_both(
            q, tq, m, mass, mean, o, t, p0, p1, p2, p3, active_short, first_query,
            K, V, TK, TV, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, BIASED, EARLY, TANGENT, SCORES, HAS_TQ,
            HAS_TK, HAS_TV,
        )  # fmt: skip
        m, mass, mean, o, t = walk_both(
            q, tq, m, mass, mean, o, t, p1, p2, p3, p4, constant_short, first_query,
            K, V, TK, TV, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, BIASED, EARLY, TANGENT, SCORES, HAS_TQ,
            False, False,
        )  # fmt: skip
    else:
        m, mass, mean, o, t = walk_both(
            q, tq, m, mass, mean, o, t, p0, p2, p2, p4, tl.minimum(active_short, constant_short), first_query,
            K, V, TK, TV, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, BIASED, EARLY, TANGENT, SCORES, HAS_TQ,
            HAS_TK, HAS_TV,
        )  # fmt: skip
    return m, mass, mean, o, t


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    Q, K, V, TQ, TK, TV, OUT, LSE, TO, MEAN, BIAS, INTERVALS, ROW_PTR, ROW_TILES, LISTED,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    tq_batch, tq_head, tq_stride, tk_batch, tk_head, tk_stride, tv_batch, tv_head, tv_stride,
    heads, group, queries, keys, query_tiles, key_tiles, mask_step, listed, bias_step, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    EARLY: tl.constexpr,
    ROLE: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
):  # fmt: skip
    """One query tile of one head of those that are LISTED, which are of one role; tangents as far as there are any.

    ROLE: see `attention_launch_triton`; each is a launch of its own, since one program for all holds more in registers
    than there are. MASKED: some tile is partial or cut short. `group` query heads share a key head; `mask_step` is 1
    for a mask per sample and else 0.
    """
    program = tl.program_id(0)
    outer = program // listed
    # The tiles with most work first, so that none of them starts when the others are done.
    entry = tl.load(LISTED + program % listed)
    tile = entry % query_tiles
    batch = tl.where(mask_step == 0, outer // heads, entry // query_tiles)
    head = tl.where(mask_step == 0, outer % heads, outer)
    row = batch * heads + head
    pointers = ROW_PTR + entry * 4
    first = tile * BM
    short_tile = tl.where(keys % BN != 0, key_tiles - 1, -1)
    INTERVALS += (batch * mask_step).to(tl.int64) * queries * (2 * RANGES)
    batch = batch.to(tl.int64)
    BIAS += batch * bias_step
    head = head.to(tl.int64)
    key_head = head // group
    Q += batch * q_batch + head * q_head
    K += batch * k_batch + key_head * k_head
    V += batch * v_batch + key_head * v_head
    if HAS_TQ:
        TQ += batch * tq_batch + head * tq_head
    if HAS_TK:
        TK += batch * tk_batch + key_head * tk_head
    if HAS_TV:
        TV += batch * tv_batch + key_head * tv_head
    q = load_rows(Q, first, queries, q_stride, BM, D, D_PAD, True)
    # Without a tangent of the query, score tangents come from keys alone.
    WITH_TQ: tl.constexpr = HAS_TQ and (ROLE == 0 or ROLE == 2)
    WITH_TK: tl.constexpr = HAS_TK and ROLE != 1
    WITH_TV: tl.constexpr = HAS_TV and ROLE != 1
    TANGENT: tl.constexpr = WITH_TQ or WITH_TK or WITH_TV
    SPLIT: tl.constexpr = ROLE >= 2 and (HAS_TK or HAS_TV)
    tq = load_rows(TQ, first, queries, tq_stride, BM, D, D_PAD, True) if WITH_TQ else q
    m = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, E_PAD], tl.float32)
    t = tl.zeros([BM, E_PAD], tl.float32)
    m, mass, mean, o, t = walk_row(
        q, tq, m, mass, mean, o, t, pointers, short_tile, first,
        K, V, TK, TV, BIAS, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
        scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, BIASED, EARLY, TANGENT, SPLIT, WITH_TQ, WITH_TK,
        WITH_TV, WITH_TQ or WITH_TK,
    )  # fmt: skip
    # Compared with 0 and not by order, so that a NaN stays one.
    empty = mass == 0
    total = tl.where(empty, 1.0, mass)
    place = row.to(tl.int64) * queries
    rows = first + tl.arange(0, BM)
    store_rows(OUT + place * E, o / total[:, None], first, queries, BM, E, E_PAD, UPCAST)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(LSE + place + rows, lse, mask=rows < queries)
    if HAS_TQ or HAS_TK or HAS_TV:
        store_rows(TO + place * E, t / total[:, None], first, queries, BM, E, E_PAD, UPCAST)
        tl.store(MEAN + place + rows, mean, mask=rows < queries)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask | None = None, scale: float | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, Nq, E] in the dtype of q, contiguous, and natural log-sum-exp [B, H, Nq] in fp32.

    A query that sees no key gets 0 and -inf. Keys and values must be finite, also those that nobody sees: a weight of
    zero times a NaN is a NaN.

    Args:
        q: [B, H, Nq, D] on CUDA (or on the CPU under Triton's interpreter); fp32, fp16 or bf16, any strides.
        k: [B, G, Nk, D], G a divisor of H.
        v: [B, G, Nk, E].
        mask: which keys each query sees, on the device of q; None is all.
        scale: factor of the scores; None is 1 / sqrt(D).
        config: tiles to use in place of those that `tuning.choice_triton` chooses.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or have no Triton kernel.
    """
    output, lse, _, _ = launch_forward((q, k, v), (None, None, None), mask, scale, config)
    return output, lse


def attention_forward_jvp(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, *,
    mask: AttentionMask | None = None, scale: float | None = None, config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`attention_forward`, and the tangents of both results (arXiv:2410.11081, Appendix F).

    Where the mask promises that a tangent is zero it is not read.

    Args:
        q: as in `attention_forward`, likewise k, v, mask, scale, config.
        tq: tangent of q in its dtype, with strides of its own; None is zero and costs nothing. Likewise tk and tv.

    Returns:
        output [B, H, Nq, E], log-sum-exp [B, H, Nq], tangent of the output [B, H, Nq, E], tangent of the log-sum-exp
        [B, H, Nq] in fp32, 0 for a query that sees no key.

    Raises:
        ValueError: as `attention_forward`, or a tangent does not fit its primal.
    """
    check_tangents((q, k, v), (tq, tk, tv))
    output, lse, tangent, mean = launch_forward((q, k, v), (tq, tk, tv), mask, scale, config)
    if tangent is None or mean is None:
        return output, lse, torch.zeros_like(output), torch.zeros_like(lse)
    return output, lse, tangent, mean


def launch_forward(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: AttentionMask | None,
    scale: float | None,
    config: TileConfig | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, lse and their tangents, None without any tangent, by `forward_kernel`."""
    check_inputs(*primals, mask)
    check_supported(primals[0], primals[2])
    q, k, v = (with_unit_stride(x) for x in primals)
    tq, tk, tv = (None if x is None else with_unit_stride(x) for x in tangents)
    has = (tq is not None, tk is not None, tv is not None)
    mask = prepare_mask(mask, q, k)
    batch, heads, queries, width = q.shape
    value_width = v.shape[-1]
    output = torch.empty((batch, heads, queries, value_width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    tangent = torch.empty_like(output) if any(has) else None
    mean = torch.empty_like(lse) if any(has) else None
    if lse.numel() == 0:
        return output, lse, tangent, mean
    factor, (bias, bias_step, is_biased) = scale_of(q, scale), bias_of(mask, lse)

    def launch(tiles: TileConfig) -> None:
        schedule, switches = mask.schedule(tiles.query_tile, tiles.key_tile), switches_of(mask, tiles)
        for role in (ACTIVE, KEYS, CONSTANT) if switches.activity and any(has) else (PLAIN,):
            # A mask for all samples lists its tiles once for each of them.
            listed = switches.lists[role]
            copies = heads if mask.batch > 1 else batch * heads
            if len(listed) == 0:
                continue
            forward_kernel[(len(listed) * copies,)](
                q, k, v, q if tq is None else tq, k if tk is None else tk, v if tv is None else tv,
                output, lse, output if tangent is None else tangent, lse if mean is None else mean, bias,
                mask.intervals, schedule.row_ptr, schedule.row_tiles, listed,
                *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(tq), *strides_of(tk), *strides_of(tv),
                heads, heads // k.shape[1], queries, mask.keys, triton.cdiv(queries, tiles.query_tile),
                triton.cdiv(mask.keys, tiles.key_tile), int(mask.batch > 1), len(listed), bias_step, factor,
                factor * LOG2_E,
                D=width, E=value_width, D_PAD=padded(width), E_PAD=padded(value_width), RANGES=mask.intervals.shape[2],
                BM=tiles.query_tile, BN=tiles.key_tile, UPCAST=upcast(q.dtype), MASKED=switches.masked,
                BIASED=is_biased, EARLY=tiles.early, ROLE=role, HAS_TQ=has[0], HAS_TK=has[1], HAS_TV=has[2],
                num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
            )  # fmt: skip

    with torch.cuda.device_of(q):
        chosen = config or choose(tune_key("jvp" if any(has) else "forward", q, v, mask, has), launch)
        launch(chosen)
    return output, lse, tangent, mean
