"""Which chunks a cache holds, where they stand, and how large it is: integers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.cache.plan import CachePlan, Segment, cache_bytes, positions_of
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy, PositionKind
from tests.causal_video.tiny_causal import layouts, quantised_cache_bytes, windows


@given(st.data())
def test_retained_and_evicted_chunks_follow_the_mask(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    policy = data.draw(windows(layout))
    plan, window = CachePlan(layout, policy), policy.chunk_window(layout)
    held: set[int] = set()
    most = 0
    for chunk in range(layout.chunks + 4):
        width = chunk + 1 if window.window is None else window.window
        # Only what this chunk's mask row shows, the chunk itself left out: W - 1 chunks of the window, not W.
        assert held == {j for j in range(chunk) if j > chunk - width or j < window.sink}
        assert [s.chunk for s in plan.retained(chunk)] == sorted(held)
        most = max(most, sum(layout.length(c) for c in held) + layout.length(chunk))
        assert plan.capacity_frames(chunk + 1) == most
        assert plan.segment(chunk).is_sink == (chunk < window.sink)
        held.add(chunk)
        leaving = {s.chunk for s in plan.evicted(chunk)}
        assert leaving <= held
        assert not any(c < window.sink for c in leaving)
        held -= leaving


def test_the_first_eviction_and_the_capacity_of_a_released_system() -> None:
    plan = CachePlan(ChunkLayout.uniform(21, 3), CachePolicy(9, 3, "static"))
    assert [[s.chunk for s in plan.evicted(c)] for c in range(6)] == [[], [], [], [1], [2], [3]]
    assert plan.capacity_frames(100) == 12
    assert [s.chunk for s in plan.retained(50)] == [0, 48, 49]


@given(st.data())
def test_positions(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    plan = CachePlan(layout, data.draw(windows(layout)))
    for chunk in range(layout.chunks + 3):
        stored, query = plan.retained(chunk), plan.segment(chunk)
        kinds: tuple[PositionKind, ...] = ("absolute", "slot", "shifted")
        absolute, slot, shifted = (positions_of(stored, query, kind) for kind in kinds)
        numbers = [f for s in stored for f in range(s.start, s.start + s.frames)]
        assert list(absolute[0]) == numbers
        assert absolute[1] == shifted[1] == tuple(range(query.start, query.start + query.frames))
        assert list(slot[0] + slot[1]) == list(range(len(numbers) + query.frames))
        # Slot and shifted positions differ by one constant; without a gap absolute ones do too.
        offset = query.start - slot[1][0]
        assert [p + offset for p in slot[0]] == list(shifted[0])
        contiguous = numbers == list(range(query.start - len(numbers), query.start))
        assert (absolute == shifted) == contiguous


def test_a_shifted_sink_ends_before_the_window() -> None:
    stored = (Segment(0, 0, 3, True), Segment(5, 15, 3, False), Segment(6, 18, 3, False))
    positions, own = positions_of(stored, Segment(7, 21, 3, False), "shifted")
    assert positions == (12, 13, 14, 15, 16, 17, 18, 19, 20)
    assert own == (21, 22, 23)
    alone, _ = positions_of(stored[:1], Segment(7, 21, 3, False), "shifted")
    assert alone == (18, 19, 20)


def test_sizes_of_released_systems() -> None:
    # Wan 2.1 at 480 x 832 in bf16, a frame: 1.3B has 30 layers of 12 heads, 14B 40 layers of 40 heads.
    small = cache_bytes(1, tokens_per_frame=1560, layers=30, batch=1, heads=12, head_width=128, number_bytes=2)
    large = cache_bytes(1, tokens_per_frame=1560, layers=40, batch=1, heads=40, head_width=128, number_bytes=2)
    assert small == 287_539_200
    assert large == 1_277_952_000
    narrow = quantised_cache_bytes(1, tokens_per_frame=1560, layers=30, batch=1, heads=12, head_width=128, kind="int8")
    assert narrow == small // 2 * 132 // 128


def test_a_policy_that_does_not_fit_has_no_plan() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        CachePlan(ChunkLayout((3, 3)), CachePolicy(4))
