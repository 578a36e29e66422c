"""Which chunks a rolling cache holds, when they leave, and where they stand: pure functions of integers.

Legend: L layers, B batch, H heads, P tokens per frame, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy, ChunkWindow, PositionKind


@dataclass(frozen=True)
class Segment:
    """A chunk in the cache: its number, its first frame, its number of frames, and whether it is part of the sink."""

    chunk: int
    start: int
    frames: int
    is_sink: bool


@dataclass(frozen=True)
class CachePlan:
    """What is kept of a stream that is cut by `layout` and remembered by `policy`.

    Raises:
        ValueError: the policy does not fit the layout.
    """

    layout: ChunkLayout
    policy: CachePolicy

    def __post_init__(self) -> None:
        self.policy.chunk_window(self.layout)

    @cached_property
    def window(self) -> ChunkWindow:
        """The policy in chunks."""
        return self.policy.chunk_window(self.layout)

    def segment(self, chunk: int) -> Segment:
        """A chunk as it is stored."""
        return Segment(chunk, self.layout.start(chunk), self.layout.length(chunk), chunk < self.window.sink)

    def retained(self, chunk: int) -> tuple[Segment, ...]:
        """The earlier chunks that a chunk sees, in the order of their positions."""
        sink, recent = self.window.visible(chunk)
        return tuple(self.segment(c) for c in (*sink, *recent) if c != chunk)

    def evicted(self, chunk: int) -> tuple[Segment, ...]:
        """What leaves once `chunk` is committed: seen by it, or it itself, and not seen by the next one."""
        kept = self.retained(chunk + 1)
        return tuple(s for s in (*self.retained(chunk), self.segment(chunk)) if s not in kept)

    def capacity_frames(self, chunks: int) -> int:
        """The most frames that one of the first `chunks` chunks attends to, its own included."""
        return max(sum(s.frames for s in self.retained(c)) + self.layout.length(c) for c in range(chunks))


def positions_of(
    stored: tuple[Segment, ...], query: Segment, kind: PositionKind
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Temporal positions of the stored frames, and of the query's frames.

    "absolute": frame numbers. "slot": counted from 0 through sink, window and query. "shifted": frame numbers, but the
    sink ends just before the oldest frame of the window (or of the query where the window is empty).

    Args:
        stored: sink segments, then window segments, each in order.
        query: the chunk that attends.
        kind: see above.
    """
    sink = [f for s in stored if s.is_sink for f in range(s.start, s.start + s.frames)]
    window = [f for s in stored if not s.is_sink for f in range(s.start, s.start + s.frames)]
    own = list(range(query.start, query.start + query.frames))
    if kind == "slot":
        total = len(sink) + len(window)
        return tuple(range(total)), tuple(range(total, total + len(own)))
    if kind == "shifted":
        oldest = (window or own)[0]
        sink = list(range(oldest - len(sink), oldest))
    return (*sink, *window), tuple(own)


def cache_bytes(
    frames: int, *, tokens_per_frame: int, layers: int, batch: int, heads: int, head_width: int, number_bytes: int
) -> int:
    """Size of keys and values that are not quantised: 2 L B frames P H d numbers.

    Wan 2.1 1.3B at 480 x 832 in bf16: 287.5 million bytes a frame.
    """
    return 2 * layers * batch * frames * tokens_per_frame * heads * head_width * number_bytes
