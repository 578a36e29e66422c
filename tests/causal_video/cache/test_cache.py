"""The cache as a value: what it holds, positions, prompts, and what it weighs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.cache.plan import cache_bytes
from fewstep.causal_video.cache.rolling import RollingCache, recache
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.prefix import KeysValues, Prefix
from fewstep.causal_video.model.rope import FrameGrid, rotary_angles
from fewstep.causal_video.policy import CachePolicy, PositionKind, QuantiseKind
from fewstep.core.tangents.processors import rotate_pairs
from tests.causal_video.tiny_causal import (
    FRAME_TOKENS,
    build_student,
    chunk_times,
    fill,
    largest,
    latents,
    layouts,
    quantised_cache_bytes,
    shared_student,
    text,
    windows,
)

T = torch.tensor([0.25, 0.75], dtype=torch.float64)


def numbered(chunk: int, frames: int, *, tokens: int = 2, offset: float = 0.0) -> KeysValues:
    """Keys and values [1, 1, 1, frames * tokens, 4] that say which chunk they are of."""
    keys = torch.full((1, 1, 1, frames * tokens, 4), float(chunk) + offset, dtype=torch.float64)
    return KeysValues(keys, keys + 100)


def filled(layout: ChunkLayout, policy: CachePolicy, chunks: int) -> RollingCache:
    """A cache after that many numbered chunks."""
    cache = RollingCache.empty(layout, policy)
    for chunk in range(chunks):
        cache = cache.commit(numbered(chunk, layout.length(chunk)))
    return cache


def numbers(prefix: Prefix) -> list[float]:
    """The first number of each token's keys in layer 0."""
    empty = torch.zeros(1, 1, 0, 4, dtype=torch.float64)
    return prefix.with_own(0, empty, empty)[0][0, 0, :, 0].tolist()


@given(st.data())
def test_contents_are_what_the_plan_says(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    policy = data.draw(windows(layout))
    cache = RollingCache.empty(layout, policy)
    for chunk in range(layout.chunks + 3):
        assert cache.next_chunk == chunk
        held = [s.chunk for s in cache.plan.retained(chunk)]
        assert [e.segment.chunk for e in cache.entries] == held
        assert numbers(cache.read()) == [float(c) for c in held for _ in range(layout.length(c) * 2)]
        assert cache.frames + layout.length(chunk) <= cache.plan.capacity_frames(layout.chunks + 3)
        cache = cache.commit(numbered(chunk, layout.length(chunk)))


def test_sinks_stay_bit_identical_for_ever() -> None:
    layout = ChunkLayout.uniform(4, 1)
    cache = filled(layout, CachePolicy(2, 2, "identity"), 2)
    sinks = [entry.content for entry in cache.entries]
    for chunk in range(2, 30):
        cache = cache.commit(numbered(chunk, 1))
        assert [entry.content for entry in cache.entries[:2]] == sinks
    assert numbers(cache.read()) == [0, 0, 1, 1, 29, 29]


def test_reading_changes_nothing_and_two_calls_agree() -> None:
    # I5.
    student, layout = shared_student(), ChunkLayout((1, 2, 2, 2))
    _, cache, _ = fill(student, latents(), chunk_times(layout), text(), layout, CachePolicy(4))
    before = [tuple(part.clone() for part in entry.content.layer(1)) for entry in cache.entries]
    first = student.readonly(latents(2), T, text(), cache.read())
    second = student.append(latents(2), T, text(), cache.read()).velocity
    assert torch.equal(first, second)
    assert cache.next_chunk == 4
    for entry, (keys, values) in zip(cache.entries, before, strict=True):
        assert torch.equal(entry.content.layer(1)[0], keys)
        assert torch.equal(entry.content.layer(1)[1], values)


def test_a_branch_does_not_disturb_its_origin() -> None:
    layout = ChunkLayout.uniform(3, 1)
    origin = filled(layout, CachePolicy(3), 3)
    branch = origin.commit(numbered(3, 1, offset=0.5))
    assert numbers(origin.read()) == [1, 1, 2, 2]
    assert numbers(branch.read()) == [2, 2, 3.5, 3.5]
    assert numbers(origin.commit(numbered(3, 1)).read()) == [2, 2, 3, 3]


def test_what_is_stored_has_no_graph() -> None:
    student = build_student(layers=1)
    output = student.append(latents(1), T, text(), RollingCache.empty(ChunkLayout((1,)), CachePolicy()).read())
    assert output.velocity.requires_grad
    assert output.keys_values is not None
    assert not output.keys_values.keys.requires_grad
    keys = torch.randn(1, 1, 1, 2, 4, requires_grad=True) * 2
    cache = RollingCache.empty(ChunkLayout((2,)), CachePolicy()).commit(KeysValues(keys, keys))
    content = cache.entries[0].content
    assert isinstance(content, KeysValues)
    assert not content.keys.requires_grad
    assert torch.equal(content.keys, keys)


def position_outputs(layout: ChunkLayout, x: Tensor, window: int, *, sink: int) -> dict[PositionKind, Tensor]:
    """Velocities of streams that differ in their positions alone."""
    found: dict[PositionKind, Tensor] = {}
    kinds: tuple[PositionKind, ...] = ("absolute", "slot", "shifted")
    for kind in kinds:
        policy = CachePolicy(window, sink, "static" if sink else "none", positions=kind)
        found[kind] = fill(shared_student(), x, chunk_times(layout), text(), layout, policy)[0]
    return found


def test_positions_agree_until_there_is_a_gap() -> None:
    # I4: (a) nothing evicted, (b) evicted without a sink, (c) and (d) with a sink and a gap.
    layout = ChunkLayout.uniform(6, 1)
    x = latents(6)
    for window, sink in ((6, 0), (2, 0), (5, 1)):
        found = position_outputs(layout, x, window, sink=sink)
        assert largest(found["absolute"], found["slot"]) < 1e-12
        assert largest(found["absolute"], found["shifted"]) < 1e-12
    found = position_outputs(layout, x, 2, sink=1)
    assert largest(found["slot"], found["shifted"]) < 1e-12
    assert largest(found["absolute"][:, :, :3], found["shifted"][:, :, :3]) < 1e-12
    assert largest(found["absolute"][:, :, 3:], found["shifted"][:, :, 3:]) > 1e-4


def test_turning_a_turned_key_further_equals_turning_it_once() -> None:
    # I4 (e).
    key = torch.randn(1, 1, 4, 12, dtype=torch.float64)
    grid, widths = FrameGrid(2, 2), (4, 4, 4)
    device, dtype = torch.device("cpu"), torch.float64
    # The first frame keeps the offset from being taken away.
    at = [rotary_angles([0, f], grid, widths, device=device, dtype=dtype) for f in (3, 8, 5)]
    cos3, cos8, cos5 = (a[0][:, :, 4:] for a in at)
    sin3, sin8, sin5 = (a[1][:, :, 4:] for a in at)
    spatial = rotary_angles([0], grid, widths, device=device, dtype=dtype)
    once = rotate_pairs(key, cos8, sin8)
    # 3 then 5 frames further turns height and width twice, so these are turned back.
    twice = rotate_pairs(rotate_pairs(rotate_pairs(key, cos3, sin3), cos5, sin5), spatial[0], -spatial[1])
    assert largest(once, twice) < 1e-14


def test_streams_of_any_length_have_the_angles_of_short_ones() -> None:
    # An hour in, positions are beyond every table; only differences count.
    layout, policy = ChunkLayout.uniform(2, 1), CachePolicy(2, 1, "static")
    student = shared_student()
    early = filled_with_student(layout, policy, 0)
    late = filled_with_student(layout, policy, 100_000)
    outputs = [student.readonly(latents(1), T, text(), cache.read()) for cache in (early, late)]
    assert min(late.read().positions) > 90_000
    assert torch.equal(outputs[0], outputs[1])


def filled_with_student(layout: ChunkLayout, policy: CachePolicy, shift: int) -> RollingCache:
    """A cache after four chunks, whose chunks beyond the sink are renumbered by `shift`."""
    import dataclasses

    _, cache, _ = fill(shared_student(), latents(4), torch.zeros(2, 4), text(), layout.extended(4), policy)
    entries = tuple(
        e
        if e.segment.is_sink
        else dataclasses.replace(
            e, segment=dataclasses.replace(e.segment, chunk=e.segment.chunk + shift, start=e.segment.start + shift)
        )
        for e in cache.entries
    )
    return dataclasses.replace(cache, next_chunk=cache.next_chunk + shift, entries=entries)


@pytest.mark.parametrize("lengths", [(1, 2, 2, 2), (2, 2, 2, 1)])
def test_recache_under_the_same_prompt_gives_back_what_was_stored(lengths: tuple[int, ...]) -> None:
    # I7: from the true beginning, with the mask of training.
    student, layout, x = shared_student(), ChunkLayout(lengths), latents()
    _, cache, _ = fill(student, x, torch.zeros(2, 7), text(), layout)
    chunks = [x[:, :, e.segment.start : e.segment.start + e.segment.frames] for e in cache.entries]
    again = recache(student, cache, chunks, text(), keep_sink=False)
    other = recache(student, cache, chunks, text(seed=5), keep_sink=False)
    assert again.next_chunk == 4
    for old, new, changed in zip(cache.entries, again.entries, other.entries, strict=True):
        assert largest(old.content.layer(2)[0], new.content.layer(2)[0]) < 1e-12
        assert largest(old.content.layer(2)[1], new.content.layer(2)[1]) < 1e-12
        assert largest(old.content.layer(2)[0], changed.content.layer(2)[0]) > 1e-3


def test_recache_after_evictions_loses_old_context_and_keeps_the_sink() -> None:
    student, layout, x = shared_student(), ChunkLayout.uniform(6, 1), latents(6)
    _, cache, _ = fill(student, x, torch.zeros(2, 6), text(), layout, CachePolicy(3, 1, "static"))
    chunks = [x[:, :, e.segment.start : e.segment.start + 1] for e in cache.entries]
    again = recache(student, cache, chunks, text())
    assert again.entries[0] is cache.entries[0]
    assert [e.segment for e in again.entries] == [e.segment for e in cache.entries]
    renewed = recache(student, cache, chunks, text(seed=5), keep_sink=False)
    assert all(
        largest(n.content.layer(2)[0], o.content.layer(2)[0]) > 1e-3
        for n, o in zip(renewed.entries, again.entries, strict=True)
    )
    # Chunk 4 once saw chunks 2 and 3, which are gone: in the first layer nothing shows it, in the last one it does.
    assert largest(again.entries[1].content.layer(0)[0], cache.entries[1].content.layer(0)[0]) < 1e-12
    assert largest(again.entries[1].content.layer(2)[0], cache.entries[1].content.layer(2)[0]) > 1e-4
    with pytest.raises(ValueError, match="3 segments, got 1"):
        recache(student, cache, chunks[:1], text())
    averaged = filled(ChunkLayout.uniform(3, 1), CachePolicy(2, 1, "ema"), 3)
    with pytest.raises(ValueError, match="no latents to be computed from"):
        recache(student, averaged, chunks[:2], text(), keep_sink=False)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_bytes_are_the_formula_and_what_is_allocated(data: st.DataObject) -> None:
    layout = data.draw(layouts(most=4))
    kind: QuantiseKind = data.draw(st.sampled_from(["none", "int8", "fp8"]))
    window = data.draw(st.integers(1, 3))
    policy = CachePolicy(window * layout.longest, quantise=kind)
    _, cache, _ = fill(shared_student(), latents(layout.frames), chunk_times(layout), text(), layout, policy)
    shape: dict[str, Any] = {"tokens_per_frame": FRAME_TOKENS, "layers": 3, "batch": 2, "heads": 2, "head_width": 12}
    if kind == "none":
        expected = cache_bytes(cache.frames, **shape, number_bytes=8)
    else:
        expected = quantised_cache_bytes(cache.frames, **shape, kind=kind)
    assert cache.bytes() == expected
    assert sum(size for _, size in storages(cache)) == expected


def storages(cache: RollingCache) -> set[tuple[int, int]]:
    """(address, bytes) of all memory behind a cache."""
    tensors: list[Tensor] = []
    for entry in cache.entries:
        parts = vars(entry.content)
        for part in (parts["keys"], parts["values"]):
            tensors += [part] if isinstance(part, Tensor) else [part.numbers, part.scales]
    return {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}


def test_other_contents_and_wrong_chunks_are_refused() -> None:
    cache = filled(ChunkLayout((2, 2)), CachePolicy(), 1)
    with pytest.raises(ValueError, match="no whole number per frame"):
        cache.commit(numbered(1, 3, tokens=1))
    with pytest.raises(ValueError, match="must bring keys"):
        cache.commit(numbered(1, 1, tokens=2))
    with pytest.raises(ValueError, match="need as many contents"):
        cache.with_contents([])
    assert numbers(cache.with_contents([numbered(7, 2)]).read()) == [7.0] * 4
    with pytest.raises(ValueError, match="both be"):
        KeysValues(torch.zeros(1, 1, 1, 2, 4), torch.zeros(1, 1, 1, 3, 4))
