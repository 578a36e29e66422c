"""What a chunk sees of the past: window, sink, positions, context, and the precision in which it is kept.

One object serves training masks, rollouts and streaming, so that a student is run as it was trained.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

from fewstep.causal_video.layout import ChunkLayout

SinkKind = Literal["none", "static", "identity", "ema"]
PositionKind = Literal["absolute", "slot", "shifted"]
QuantiseKind = Literal["none", "int8", "fp8"]
EMA_DECAY = 0.99


@dataclass(frozen=True)
class ChunkWindow:
    """The window in chunks, the own one included (None: all), and the number of first chunks that stay visible."""

    window: int | None
    sink: int

    def visible(self, chunk: int) -> tuple[range, range]:
        """(sink chunks, window chunks) that a chunk sees, its own among the latter; disjoint, in order."""
        first = 0 if self.window is None else max(0, chunk - self.window + 1)
        return range(min(self.sink, first)), range(first, chunk + 1)

    def has_gap(self, chunks: int) -> bool:
        """Whether some chunk among the first `chunks` sees the sink and misses a chunk after it."""
        return self.window is not None and self.sink > 0 and chunks > self.window + self.sink


@dataclass(frozen=True)
class CachePolicy:
    """What is visible of earlier chunks, and how it is kept. Frames are latent frames.

    Attributes:
        window_frames: latest frames that are seen, the own chunk included; a multiple of the longest chunk. None: all.
        sink_frames: first frames that stay visible when the window has left them; they do not count in the window.
        sink: "static" keeps the first chunk (LongLive, arXiv:2509.22622), "identity" several first chunks (AHIS of
            LiveTalk, arXiv:2512.23576), "ema" a running mean of what leaves the window (Reward Forcing,
            arXiv:2512.04678), which needs equal chunks.
        ema_decay: weight of the old sink in [0, 1]; 1 is a static sink, 0 keeps what left last.
        positions: temporal RoPE positions where a gap lies between sink and window. "absolute": frame numbers, the
            distance to the sink grows without bound. "slot": counted through sink and window. "shifted": the sink is
            moved to just before the window. The last two give the same numbers; all three agree without a gap.
        noisy_from: first chunk whose context is the keys and values of its last denoising call, not those of a call on
            the clean result (noisy context of Causal-rCM); None: all contexts are clean.
        quantise: storage of keys and values: "none" as the network computes them, "int8", or "fp8" (e4m3).

    Raises:
        ValueError: an unknown choice, a number out of range, or a combination that means nothing.
    """

    window_frames: int | None = None
    sink_frames: int = 0
    sink: SinkKind = "none"
    ema_decay: float = EMA_DECAY
    positions: PositionKind = "shifted"
    noisy_from: int | None = None
    quantise: QuantiseKind = "none"

    def __post_init__(self) -> None:
        for name, kinds in (("sink", SinkKind), ("positions", PositionKind), ("quantise", QuantiseKind)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {list(get_args(kinds))}, got {getattr(self, name)!r}")
        if self.window_frames is not None and self.window_frames < 1:
            raise ValueError(
                f"window_frames must be at least 1 (the own chunk counts) or None, got {self.window_frames}"
            )
        if (self.sink == "none") != (self.sink_frames == 0) or self.sink_frames < 0:
            raise ValueError(
                f"sink={self.sink!r} with sink_frames={self.sink_frames}: a sink has at least 1 frame, and frames need "
                "a kind of sink"
            )
        if self.sink != "none" and self.window_frames is None:
            raise ValueError(f"sink={self.sink!r} without window_frames: nothing is ever forgotten, so set a window")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay must lie in [0, 1], got {self.ema_decay}")
        if self.sink != "ema" and self.ema_decay != EMA_DECAY:
            raise ValueError(
                f"ema_decay={self.ema_decay} belongs to sink='ema', and sink is {self.sink!r}: leave it out"
            )
        if self.noisy_from is not None and self.noisy_from < 0:
            raise ValueError(f"noisy_from is the number of a chunk, at least 0, or None, got {self.noisy_from}")
        if self.sink == "ema" and self.positions == "absolute":
            raise ValueError("a running mean over many frames has no absolute position: use slot or shifted positions")
        if self.sink == "ema" and self.quantise != "none":
            raise ValueError("a quantised running mean loses small updates: use quantise='none' with sink='ema'")

    def is_noisy(self, chunk: int) -> bool:
        """Whether a chunk's context is that of its last denoising call."""
        return self.noisy_from is not None and chunk >= self.noisy_from

    def chunk_window(self, layout: ChunkLayout) -> ChunkWindow:
        """The policy in chunks of a layout.

        Raises:
            ValueError: the window is no multiple of the longest chunk, the sink does not end with a chunk, is longer
                than the first chunk and not of the kind "identity", or a running mean meets chunks of unequal lengths.
        """
        if self.window_frames is None:
            return ChunkWindow(None, 0)
        if self.window_frames % layout.longest:
            raise ValueError(
                f"window_frames={self.window_frames} is no multiple of the longest chunk, {layout.longest} frames: a "
                "window is a whole number of chunks, the own one included"
            )
        window = self.window_frames // layout.longest
        if self.sink_frames == 0:
            return ChunkWindow(window, 0)
        ends = list(itertools.accumulate(layout.lengths))
        if self.sink_frames not in ends:
            raise ValueError(
                f"sink_frames={self.sink_frames} does not end with a chunk: the first chunks end at {ends[:4]} frames"
            )
        sink = ends.index(self.sink_frames) + 1
        if sink > 1 and self.sink != "identity":
            raise ValueError(
                f"sink_frames={self.sink_frames} is longer than the first chunk, {layout.lengths[0]} frames: several "
                "chunks are sink='identity'"
            )
        if self.sink == "ema" and len(set(layout.lengths)) > 1:
            raise ValueError(f"sink='ema' averages whole chunks and needs equal ones, got {list(layout.lengths)}")
        return ChunkWindow(window, sink)


KEEP_ALL = CachePolicy()
