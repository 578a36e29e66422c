"""Chunks: bounds, endless layouts, pixel frames, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.layout import ChunkLayout
from tests.causal_video.tiny_causal import layouts


def test_layouts_of_released_systems() -> None:
    assert ChunkLayout.uniform(21, 3).lengths == (3,) * 7
    assert ChunkLayout.first(21, 4, 1).lengths == (1, 4, 4, 4, 4, 4)
    assert ChunkLayout.first(21, 4, 5).lengths == (5, 4, 4, 4, 4)
    assert ChunkLayout((1, 3, 3, 3, 3, 3, 3, 2)).frames == 21


@pytest.mark.parametrize(("frames", "chunk"), [(21, 4), (2, 3), (0, 1), (4, 0)])
def test_frames_that_do_not_fit_are_refused(frames: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        ChunkLayout.uniform(frames, chunk)


@pytest.mark.parametrize(("frames", "chunk", "first"), [(21, 4, 2), (2, 1, 3), (5, 0, 1), (5, 4, 0)])
def test_first_chunks_that_do_not_fit_are_refused(frames: int, chunk: int, first: int) -> None:
    with pytest.raises(ValueError, match="must be a multiple"):
        ChunkLayout.first(frames, chunk, first)


@pytest.mark.parametrize("lengths", [(), (3, 0), (-1,)])
def test_empty_chunks_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one chunk"):
        ChunkLayout(lengths)


@given(layout=layouts(), more=st.integers(1, 9))
def test_bounds_tile_the_frames_and_go_on_for_ever(layout: ChunkLayout, more: int) -> None:
    count = layout.chunks + more
    longer = layout.extended(count)
    owners = [chunk for chunk in range(count) for _ in range(layout.length(chunk))]
    assert [layout.chunk_of(frame) for frame in range(len(owners))] == owners
    assert [layout.start(c) for c in range(count)] == [owners.index(c) for c in range(count)]
    assert longer.frames == len(owners) == layout.end(count - 1)
    assert longer.lengths[: layout.chunks] == layout.lengths
    assert set(longer.lengths[layout.chunks :]) == {layout.lengths[-1]}
    assert sum(longer.tokens(5)) == 5 * longer.frames


@given(layout=layouts())
def test_pixel_frames_sum_to_four_k_plus_one(layout: ChunkLayout) -> None:
    assert sum(layout.pixel_frames(c) for c in range(layout.chunks)) == 4 * (layout.frames - 1) + 1
    assert layout.pixel_frames(0) == 1 + 4 * (layout.lengths[0] - 1)


def test_21_latents_are_81_frames() -> None:
    layout = ChunkLayout.uniform(21, 3)
    assert [layout.pixel_frames(c) for c in range(7)] == [9] + [12] * 6


def test_numbers_below_zero_are_refused() -> None:
    layout = ChunkLayout((2, 2))
    for call in (layout.length, layout.start, layout.end, layout.chunk_of):
        with pytest.raises(ValueError, match="counted from 0"):
            call(-1)
    with pytest.raises(ValueError, match="at least 1 chunk"):
        layout.extended(0)
    with pytest.raises(ValueError, match="at least 1 token"):
        layout.tokens(0)
    with pytest.raises(ValueError, match="stride"):
        layout.pixel_frames(0, 0)
