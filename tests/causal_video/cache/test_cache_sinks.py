"""The running mean of what leaves the window, against its closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.cache.sinks import ema_sink
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.prefix import KeysValues
from fewstep.causal_video.policy import CachePolicy


def random_chunks(count: int, frames: int) -> list[KeysValues]:
    """Keys and values [2, 1, 1, frames * 3, 4]."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 1, frames * 3, 4)
    parts = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [KeysValues(part[0], part[1]) for part in parts]


@given(
    window=st.integers(1, 3),
    frames=st.integers(1, 2),
    chunks=st.integers(1, 9),
    decay=st.sampled_from([0.0, 0.3, 0.5, 0.99, 1.0]),
)
def test_the_sink_is_its_closed_form(window: int, frames: int, chunks: int, decay: float) -> None:
    policy = CachePolicy(window * frames, frames, "ema", ema_decay=decay)
    parts = random_chunks(chunks, frames)
    cache = RollingCache.empty(ChunkLayout((frames,)), policy)
    for part in parts:
        cache = cache.commit(part)
    # Chunks 1 to chunks - window have left.
    gone = parts[1 : max(1, chunks - window + 1)]
    m = len(gone)
    content = cache.entries[0].content
    assert isinstance(content, KeysValues)
    for name in ("keys", "values"):
        expected = decay**m * getattr(parts[0], name)
        for j, part in enumerate(gone, start=1):
            expected = expected + (1 - decay) * decay ** (m - j) * getattr(part, name)
        assert float((getattr(content, name) - expected).abs().max()) < 1e-14
    if decay == 1:
        assert torch.equal(content.keys, parts[0].keys)
    if decay == 0 and m > 0:
        assert torch.equal(content.keys, gone[-1].keys)
    assert cache.frames == frames * min(chunks, window)


def test_segments_of_another_length_are_refused() -> None:
    long, short = random_chunks(1, 2)[0], random_chunks(1, 1)[0]
    with pytest.raises(ValueError, match="cannot average"):
        ema_sink(long, short, 0.9)
