"""Masks of chunks against the predicate and against rectangles, and their counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.policy import CachePolicy, ChunkWindow
from fewstep.kernels.mask_conversion import dense
from tests.causal_video.tiny_causal import layouts, windows


def sees(window: ChunkWindow, cq: int, ck: int) -> bool:
    """The predicate over chunks of one video."""
    width = cq + 1 if window.window is None else window.window
    return ck <= cq and (ck > cq - width or ck < window.sink)


def predicate(layout: ChunkLayout, tokens: int, window: ChunkWindow, *, packed: bool) -> Tensor:
    """bool [N, N], pair by pair."""
    total = layout.frames * tokens
    rows = []
    for q in range(2 * total if packed else total):
        row = []
        for k in range(2 * total if packed else total):
            cq, ck = (layout.chunk_of(i % total // tokens) for i in (q, k))
            q_noisy, k_noisy = q >= total, k >= total
            if k_noisy:
                row.append(q_noisy and cq == ck)
            else:
                row.append(sees(window, cq, ck) and not (q_noisy and ck == cq))
        rows.append(row)
    return torch.tensor(rows)


def rectangles(layout: ChunkLayout, tokens: int, window: ChunkWindow, *, packed: bool) -> Tensor:
    """bool [N, N] as a union of blocks of ones, two or three per chunk."""
    total = layout.frames * tokens
    bounds = [layout.start(c) * tokens for c in range(layout.chunks)] + [total]
    seen = torch.zeros((2 * total, 2 * total) if packed else (total, total), dtype=torch.bool)
    for chunk in range(layout.chunks):
        first = 0 if window.window is None else max(0, chunk - window.window + 1)
        rows = slice(bounds[chunk], bounds[chunk + 1])
        seen[rows, : bounds[min(window.sink, chunk + 1)]] = True
        seen[rows, bounds[first] : bounds[chunk + 1]] = True
        if packed:
            noisy = slice(total + bounds[chunk], total + bounds[chunk + 1])
            seen[noisy, : bounds[min(window.sink, chunk)]] = True
            seen[noisy, bounds[first] : bounds[chunk]] = True
            seen[noisy, noisy] = True
    return seen


@given(st.data())
def test_masks_equal_predicate_and_rectangles(data: st.DataObject) -> None:
    layout = data.draw(layouts(most=5))
    policy = data.draw(windows(layout))
    tokens = data.draw(st.integers(1, 2))
    window = policy.chunk_window(layout)
    causal = dense(masks.block_causal(layout, tokens, policy))[0]
    packed = dense(masks.teacher_forcing(layout, tokens, policy))[0]
    assert torch.equal(causal, predicate(layout, tokens, window, packed=False))
    assert torch.equal(causal, rectangles(layout, tokens, window, packed=False))
    assert torch.equal(packed, predicate(layout, tokens, window, packed=True))
    assert torch.equal(packed, rectangles(layout, tokens, window, packed=True))
    assert bool(causal.any(dim=1).all())
    assert bool(packed.any(dim=1).all())
    total = layout.frames * tokens
    assert torch.equal(packed[:total, :total], causal)
    assert not bool(packed[:total, total:].any())


@pytest.mark.parametrize("chunks", [1, 2, 7, 21])
def test_counts_of_equal_chunks(chunks: int) -> None:
    layout = ChunkLayout.uniform(chunks, 1)
    assert int(dense(masks.block_causal(layout, 1)).sum()) == chunks * (chunks + 1) // 2
    packed = dense(masks.teacher_forcing(layout, 1))[0]
    assert int(packed.sum()) == chunks * (chunks + 1)
    assert int(packed[chunks:, :chunks].sum()) == chunks * (chunks - 1) // 2
    assert int(packed[chunks:, chunks:].sum()) == chunks


def test_counts_of_a_window_with_a_sink() -> None:
    policy = CachePolicy(3, 1, "static", positions="absolute")
    seen = dense(masks.block_causal(ChunkLayout.uniform(7, 1), 1, policy))[0]
    assert seen.sum(dim=1).tolist() == [min(i + 1, 3) + min(1, max(0, i - 2)) for i in range(7)]


def test_masks_are_built_once() -> None:
    layout = ChunkLayout.uniform(6, 2)
    assert masks.block_causal(layout, 3) is masks.block_causal(ChunkLayout((2, 2, 2)), 3)
    promised = masks.teacher_forcing(layout, 3, clean_is_constant=True)
    assert promised is not masks.teacher_forcing(layout, 3)
    assert promised.query_active is not None
    assert int(promised.query_active.sum()) == 18


def test_what_a_mask_cannot_express_is_refused() -> None:
    layout = ChunkLayout.uniform(5, 1)
    for chunks in (4, 5):
        with pytest.raises(ValueError, match="changes what chunks see after chunk 2"):
            masks.block_causal(ChunkLayout.uniform(chunks, 1), 1, CachePolicy(2, 1, "ema"))
    with pytest.raises(ValueError, match="move the sink"):
        masks.teacher_forcing(layout, 1, CachePolicy(2, 1, "static"))
    # As long as nothing is between sink and window, all positions agree.
    without_gap = masks.block_causal(ChunkLayout.uniform(3, 1), 1, CachePolicy(2, 1, "static"))
    assert int(dense(without_gap).sum()) == 6
    assert int(dense(masks.block_causal(ChunkLayout.uniform(3, 1), 1, CachePolicy(2, 1, "ema"))).sum()) == 6
