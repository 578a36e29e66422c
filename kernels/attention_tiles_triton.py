"""What the Triton attention kernels are written in: rows of tokens in and out, products, and walks over lists of tiles.

Legend: BM, BN queries and keys of a tile.
"""

# No `from __future__ import annotations` here: Triton reads tl.constexpr from the annotations.
# Kernels are Triton's language and not Python's: plain numbers are passed as tl.constexpr, and static_range is a loop.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

# Beyond every place in a list of tiles.
NOWHERE = tl.constexpr(2**30)


@triton.jit
def load_bias(bias, first, keys, BN: tl.constexpr):
    """Key bias of BN keys in units of log 2, [BN]; 0 beyond the keys."""
    columns = first + tl.arange(0, BN)
    return tl.load(bias + columns, mask=columns < keys, other=0.0)


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
    """sum + a b in fp32. UPCAST: Triton's interpreter cannot multiply bf16.

    Numbers of fp32 are products of three halves on the matrix units (tf32x3), each as exact as fp32 but for its last
    bit or two; plain fp32 would leave these units idle.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="tf32x3")


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
