"""Policies: windows in chunks, and combinations that mean nothing."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy, ChunkWindow
from tests.causal_video.tiny_causal import layouts, windows


def test_windows_and_sinks_in_chunks() -> None:
    layout = ChunkLayout.uniform(21, 3)
    assert CachePolicy(9, 3, "static").chunk_window(layout) == ChunkWindow(3, 1)
    assert CachePolicy(6, 9, "identity").chunk_window(layout) == ChunkWindow(2, 3)
    assert CachePolicy().chunk_window(layout) == ChunkWindow(None, 0)
    assert CachePolicy(8, 1, "static").chunk_window(ChunkLayout.first(21, 4, 1)) == ChunkWindow(2, 1)


@given(st.data())
def test_visible_chunks_are_the_rule_of_window_and_sink(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    window = data.draw(windows(layout)).chunk_window(layout)
    for chunk in range(layout.chunks + 3):
        sink, recent = window.visible(chunk)
        width = chunk + 1 if window.window is None else window.window
        rule = [c for c in range(chunk + 1) if c > chunk - width or c < window.sink]
        assert [*sink, *recent] == rule
        assert len(rule) == min(chunk + 1, width) + min(window.sink, max(0, chunk - width + 1))


@given(st.data())
def test_a_gap_is_a_chunk_between_sink_and_window(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    window = data.draw(windows(layout)).chunk_window(layout)
    seen = [window.visible(chunk) for chunk in range(layout.chunks)]
    assert window.has_gap(layout.chunks) == any(len(s) > 0 and s[-1] + 1 < r[0] for s, r in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_frames": 0}, "at least 1"),
        ({"window_frames": 3, "sink_frames": 3}, "a sink has at least 1 frame"),
        ({"window_frames": 3, "sink": "static"}, "a sink has at least 1 frame"),
        ({"window_frames": 3, "sink_frames": -1, "sink": "static"}, "a sink has at least 1 frame"),
        ({"sink_frames": 3, "sink": "static"}, "without window_frames"),
        ({"window_frames": 3, "sink_frames": 3, "sink": "pinned"}, "sink must be one of"),
        ({"positions": "relative"}, "positions must be one of"),
        ({"quantise": "int4"}, "quantise must be one of"),
        ({"ema_decay": 1.5}, "ema_decay must lie"),
        ({"ema_decay": 0.5}, "ema_decay=0.5 belongs to sink='ema'"),
        ({"noisy_from": -1}, "noisy_from"),
        ({"window_frames": 3, "sink_frames": 3, "sink": "ema", "positions": "absolute"}, "no absolute position"),
        ({"window_frames": 3, "sink_frames": 3, "sink": "ema", "quantise": "int8"}, "quantised running mean"),
    ],
)
def test_meaningless_policies_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CachePolicy(**arguments)


@pytest.mark.parametrize(
    ("policy", "lengths", "message"),
    [
        (CachePolicy(2), (3, 3), "no multiple of the longest chunk"),
        (CachePolicy(4), (3, 3), "no multiple of the longest chunk"),
        (CachePolicy(3, 2, "static"), (3, 3), "does not end with a chunk"),
        (CachePolicy(3, 9, "identity"), (3, 3), "does not end with a chunk"),
        (CachePolicy(3, 6, "static"), (3, 3), "longer than the first chunk"),
        (CachePolicy(3, 6, "ema"), (3, 3), "longer than the first chunk"),
        (CachePolicy(3, 3, "ema"), (3, 3, 2), "needs equal ones"),
    ],
)
def test_policies_that_do_not_fit_a_layout_are_refused(
    policy: CachePolicy, lengths: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        policy.chunk_window(ChunkLayout(lengths))


def test_noisy_context_starts_at_its_chunk() -> None:
    assert [CachePolicy(noisy_from=1).is_noisy(c) for c in range(3)] == [False, True, True]
    assert [CachePolicy().is_noisy(c) for c in range(3)] == [False] * 3
