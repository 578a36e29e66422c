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
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewstep.kernels.attention_checks import check_inputs, check_mask, check_tangents
from fewstep.kernels.autotune_triton import Kind, TileConfig, TuneKey, choose, interpreting
from fewstep.kernels.mask import AttentionMask, unmasked

LOG2_E = 1.0 / math.log(2.0)
LN2 = tl.constexpr(math.log(2.0))
# Beyond every place in a list of tiles.
NOWHERE = tl.constexpr(2**30)
WIDEST_HEAD = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Tiles at which a mask is looked at for its key; nearly every list of candidates holds this size.
SEEN_AT = TileConfig(64, 64, 4, 1)
# Lengths change from call to call; these must not make Triton compile again.
LENGTHS = ["heads", "group", "queries", "keys", "query_tiles", "key_tiles", "mask_step"]


@triton.jit
def load_rows(
    base, first, count, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BOUNDED: tl.constexpr
):
    """Rows first to first + ROWS, [ROWS, PADDED]; zero beyond WIDTH, and, if BOUNDED, from row `count` on."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = base + first.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if BOUNDED:
        inside = (first + rows < count)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif WIDTH != PADDED:
        inside = (rows >= 0)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def dot(a, b, sum, UPCAST: tl.constexpr):
    """sum + a b in fp32. UPCAST: Triton's interpreter cannot multiply bf16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 to `dtype`, to the nearest. UPCAST: Triton's interpreter cuts bf16 off, which is three times less exact."""
    if UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(
    base, tile, first, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr
):
    """Write rows of a contiguous [count, WIDTH] at `base`."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    pointers = base + rows[:, None].to(tl.int64) * WIDTH + columns[None, :]
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def sees(intervals, first_query, first_key, queries, RANGES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Whether each query of a tile sees each key of a tile, [BM, BN]; never a key that does not exist."""
    rows = first_query + tl.arange(0, BM)
    columns = first_key + tl.arange(0, BN)
    inside = rows < queries
    base = intervals + rows * (2 * RANGES)
    start = tl.load(base, mask=inside, other=0)
    stop = tl.load(base + 1, mask=inside, other=0)
    seen = (columns[None, :] >= start[:, None]) & (columns[None, :] < stop[:, None])
    for r in tl.static_range(1, RANGES):
        start = tl.load(base + 2 * r, mask=inside, other=0)
        stop = tl.load(base + 2 * r + 1, mask=inside, other=0)
        seen = seen | ((columns[None, :] >= start[:, None]) & (columns[None, :] < stop[:, None]))
    return seen


@triton.jit
def short_place(tiles, begin, end, short):
    """Place of the tile `short` in the increasing list tiles[begin:end], which it can only end; NOWHERE without it."""
    last = tl.load(tiles + end - 1, mask=end > begin, other=-2)
    return tl.where(last == short, end - 1, NOWHERE)


@triton.jit
def place_of(i, partial_begin, short, MASKED: tl.constexpr):
    """Place in the list of tiles of step i of a walk.

    A full tile that is cut short by the end of the sequence needs bounds. So the walk over full tiles steps over its
    place, and the walk over partial tiles, which has them, begins one step early with it.
    """
    return tl.where(i < partial_begin, short, i) if MASKED else i + (i >= short).to(tl.int32)


@triton.jit
def walk_forward(
    q, tq, m, mass, mean, o, t, begin, end, partial_begin, short, first_query,
    K, V, TK, TV, INTERVALS, ROW_TILES,
    k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
    TANGENT: tl.constexpr, SCORES: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TK: tl.constexpr, WITH_TV: tl.constexpr,
):  # fmt: skip
    """Online softmax over one list of key tiles of one kind; returns m, mass, mean, o, t.

    TANGENT: t is carried; SCORES: some tile of this query tile may have score tangents, so the mean is carried as well.
    WITH_TQ, WITH_TK, WITH_TV: which tangents are other than zero in the tiles of this list.
    """
    for i in range(begin, end):
        first = tl.load(ROW_TILES + place_of(i, partial_begin, short, MASKED)) * BN
        k = load_rows(K, first, keys, k_stride, BN, D, D_PAD, MASKED)
        s = dot(q, tl.trans(k), None, UPCAST) * scale_log2
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
            u = None
            if WITH_TQ:
                u = dot(tq, tl.trans(k), None, UPCAST)
            if WITH_TK:
                tk = load_rows(TK, first, keys, tk_stride, BN, D, D_PAD, MASKED)
                u = dot(q, tl.trans(tk), u, UPCAST)
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
    K, V, TK, TV, INTERVALS, ROW_TILES,
    k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
    TANGENT: tl.constexpr, SCORES: tl.constexpr, WITH_TQ: tl.constexpr, WITH_TK: tl.constexpr, WITH_TV: tl.constexpr,
):  # fmt: skip
    """`walk_forward` over the full and, if the mask has any, the partial tiles of one kind of tangents."""
    moved = (short != NOWHERE).to(tl.int32)
    m, mass, mean, o, t = walk_forward(
        q, tq, m, mass, mean, o, t, full_begin, full_end - moved, partial_begin, short, first_query,
        K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
        D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, False, TANGENT, SCORES, WITH_TQ, WITH_TK, WITH_TV,
    )  # fmt: skip
    if MASKED:
        m, mass, mean, o, t = walk_forward(
            q, tq, m, mass, mean, o, t, partial_begin - moved, partial_end, partial_begin, short, first_query,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, True, TANGENT, SCORES, WITH_TQ, WITH_TK, WITH_TV,
        )  # fmt: skip
    return m, mass, mean, o, t


@triton.jit
def walk_row(
    q, tq, m, mass, mean, o, t, pointers, short_tile, first_query,
    K, V, TK, TV, INTERVALS, ROW_TILES,
    k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
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
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, TANGENT, SCORES, HAS_TQ, HAS_TK, HAS_TV,
        )  # fmt: skip
        m, mass, mean, o, t = walk_both(
            q, tq, m, mass, mean, o, t, p1, p2, p3, p4, constant_short, first_query,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, TANGENT, SCORES, HAS_TQ, False, False,
        )  # fmt: skip
    else:
        m, mass, mean, o, t = walk_both(
            q, tq, m, mass, mean, o, t, p0, p2, p2, p4, tl.minimum(active_short, constant_short), first_query,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, TANGENT, SCORES, HAS_TQ, HAS_TK, HAS_TV,
        )  # fmt: skip
    return m, mass, mean, o, t


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    Q, K, V, TQ, TK, TV, OUT, LSE, TO, MEAN,
    INTERVALS, ROW_PTR, ROW_TILES, ROW_ORDER, QUERY_ACTIVE, ROW_ACTIVE,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    tq_batch, tq_head, tq_stride, tk_batch, tk_head, tk_stride, tv_batch, tv_head, tv_stride,
    heads, group, queries, keys, query_tiles, key_tiles, mask_step, scale, scale_log2,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr, RANGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, ACTIVITY: tl.constexpr,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr,
):  # fmt: skip
    """One query tile of one head; tangents as far as there are any.

    ACTIVITY: the mask promises zero tangents somewhere. MASKED: some tile is partial or cut short. `group` query heads
    share a key head; `mask_step` is 1 for a mask per sample and else 0.
    """
    TANGENT: tl.constexpr = HAS_TQ or HAS_TK or HAS_TV
    SCORES: tl.constexpr = HAS_TQ or HAS_TK
    program = tl.program_id(0)
    row = program // query_tiles
    batch = row // heads
    head = row % heads
    mask_rows = batch * mask_step * query_tiles
    # The tiles with most work first, so that none of them starts when the others are done.
    tile = tl.load(ROW_ORDER + mask_rows + program % query_tiles)
    pointers = ROW_PTR + (mask_rows + tile) * 4
    first = tile * BM
    short_tile = tl.where(keys % BN != 0, key_tiles - 1, -1)
    INTERVALS += (batch * mask_step).to(tl.int64) * queries * (2 * RANGES)
    batch = batch.to(tl.int64)
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
    m = tl.full([BM], float("-inf"), tl.float32)
    mass = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, E_PAD], tl.float32)
    t = tl.zeros([BM, E_PAD], tl.float32)
    SPLIT: tl.constexpr = ACTIVITY and (HAS_TK or HAS_TV)
    row_active = True
    query_active = True
    if TANGENT and ACTIVITY:
        row_active = tl.load(ROW_ACTIVE + mask_rows + tile) != 0
        query_active = tl.load(QUERY_ACTIVE + tile) != 0
    if not TANGENT:
        m, mass, mean, o, t = walk_row(
            q, q, m, mass, mean, o, t, pointers, short_tile, first,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, False, False, False, False, False, False,
        )  # fmt: skip
    elif not ACTIVITY:
        tq = load_rows(TQ, first, queries, tq_stride, BM, D, D_PAD, True) if HAS_TQ else q
        m, mass, mean, o, t = walk_row(
            q, tq, m, mass, mean, o, t, pointers, short_tile, first,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, True, False, HAS_TQ, HAS_TK, HAS_TV, SCORES,
        )  # fmt: skip
    elif not row_active:
        m, mass, mean, o, t = walk_row(
            q, q, m, mass, mean, o, t, pointers, short_tile, first,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, False, False, False, False, False, False,
        )  # fmt: skip
    elif query_active:
        tq = load_rows(TQ, first, queries, tq_stride, BM, D, D_PAD, True) if HAS_TQ else q
        m, mass, mean, o, t = walk_row(
            q, tq, m, mass, mean, o, t, pointers, short_tile, first,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, True, SPLIT, HAS_TQ, HAS_TK, HAS_TV, SCORES,
        )  # fmt: skip
    else:
        # Without a tangent of the query, score tangents come from keys alone.
        m, mass, mean, o, t = walk_row(
            q, q, m, mass, mean, o, t, pointers, short_tile, first,
            K, V, TK, TV, INTERVALS, ROW_TILES, k_stride, v_stride, tk_stride, tv_stride, queries, keys, scale,
            scale_log2, D, E, D_PAD, E_PAD, RANGES, BM, BN, UPCAST, MASKED, True, SPLIT, False, HAS_TK, HAS_TV, HAS_TK,
        )  # fmt: skip
    # Compared with 0 and not by order, so that a NaN stays one.
    empty = mass == 0
    total = tl.where(empty, 1.0, mass)
    place = row.to(tl.int64) * queries
    rows = first + tl.arange(0, BM)
    store_rows(OUT + place * E, o / total[:, None], first, queries, BM, E, E_PAD, UPCAST)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(LSE + place + rows, lse, mask=rows < queries)
    if TANGENT:
        store_rows(TO + place * E, t / total[:, None], first, queries, BM, E, E_PAD, UPCAST)
        tl.store(MEAN + place + rows, mean, mask=rows < queries)


@dataclass(frozen=True)
class MaskSwitches:
    """What a kernel is compiled for: `masked`, some tile needs bounds; `activity`, the mask promises zero tangents."""

    masked: bool
    activity: bool


_switches: WeakKeyDictionary[AttentionMask, dict[tuple[int, int], MaskSwitches]] = WeakKeyDictionary()


def switches_of(mask: AttentionMask, config: TileConfig) -> MaskSwitches:
    """The switches for a mask, read once per tile size: counts of tiles live on the GPU."""
    known = _switches.setdefault(mask, {})
    tiles = (config.query_tile, config.key_tile)
    if tiles not in known:
        schedule = mask.schedule(*tiles)
        cut = mask.queries % config.query_tile != 0 or mask.keys % config.key_tile != 0
        promises = mask.query_active is not None or mask.key_active is not None
        known[tiles] = MaskSwitches(cut or schedule.partial > 0, promises)
    return known[tiles]


def prepare_mask(mask: AttentionMask | None, q: Tensor, k: Tensor) -> AttentionMask:
    """The mask of a call, checked.

    Raises:
        ValueError: the mask is for other lengths, another batch, or lies on another device.
    """
    if mask is None:
        return unmasked(q.shape[2], k.shape[2], q.device)
    check_mask(mask, q, k)
    if mask.intervals.device != q.device:
        raise ValueError(f"The mask is on {mask.intervals.device} and q on {q.device}; pass mask.to(q.device).")
    return mask


def check_supported(q: Tensor, v: Tensor) -> None:
    """Raise ValueError for a device, dtype or head that has no Triton kernel."""
    if q.dtype not in DTYPES:
        raise ValueError(f"The Triton kernels take fp32, fp16 and bf16, and q is {q.dtype}; use backend='tiled'.")
    if max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        raise ValueError(
            f"Heads are {q.shape[-1]} (q, k) and {v.shape[-1]} (v) wide and the Triton kernels take at most "
            f"{WIDEST_HEAD}; use more, narrower heads, or backend='tiled'."
        )
    if q.device.type != "cuda" and not interpreting():
        raise ValueError(f"The Triton kernels run on CUDA and q is on {q.device}; use backend='tiled'.")


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, copied unless its rows are contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def padded(width: int) -> int:
    """The power of two that holds a row; matrix units take 16 at least."""
    return max(16, triton.next_power_of_2(width))


def capability_of(q: Tensor) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) in the interpreter."""
    return (0, 0) if interpreting() else torch.cuda.get_device_capability(q.device)


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands of matrix products are converted to fp32, see `dot`."""
    return interpreting() and dtype == torch.bfloat16


def scale_of(q: Tensor, scale: float | None) -> float:
    """1 / sqrt(D) unless given."""
    if scale is not None:
        return float(scale)
    return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0


def strides_of(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens; zeros for a tensor that is not there."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


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
        config: tiles to use in place of those that `autotune_triton` chooses.

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
    factor = scale_of(q, scale)

    def launch(tiles: TileConfig) -> None:
        schedule = mask.schedule(tiles.query_tile, tiles.key_tile)
        switches = switches_of(mask, tiles)
        query_tiles = triton.cdiv(queries, tiles.query_tile)
        forward_kernel[(query_tiles * batch * heads,)](
            q, k, v, q if tq is None else tq, k if tk is None else tk, v if tv is None else tv,
            output, lse, output if tangent is None else tangent, lse if mean is None else mean,
            mask.intervals, schedule.row_ptr, schedule.row_tiles, schedule.row_order,
            schedule.query_active.view(torch.uint8), schedule.row_active.view(torch.uint8),
            *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(tq), *strides_of(tk), *strides_of(tv),
            heads, heads // k.shape[1], queries, mask.keys, query_tiles, triton.cdiv(mask.keys, tiles.key_tile),
            int(mask.batch > 1), factor, factor * LOG2_E,
            D=width, E=value_width, D_PAD=padded(width), E_PAD=padded(value_width), RANGES=mask.intervals.shape[2],
            BM=tiles.query_tile, BN=tiles.key_tile, UPCAST=upcast(q.dtype), MASKED=switches.masked,
            ACTIVITY=switches.activity, HAS_TQ=has[0], HAS_TK=has[1], HAS_TV=has[2],
            num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        chosen = config or choose(tune_key("jvp" if any(has) else "forward", q, v, mask, has), launch)
        launch(chosen)
    return output, lse, tangent, mean


def tune_key(kind: Kind, q: Tensor, v: Tensor, mask: AttentionMask, flags: tuple[bool, ...]) -> TuneKey:
    """The key of a call: `flags` and what the mask asks for."""
    switches = switches_of(mask, SEEN_AT)
    return TuneKey(
        kind, capability_of(q), q.shape[-1], v.shape[-1], q.dtype, (*flags, switches.masked, switches.activity)
    )
