"""How a video is cut into chunks: the one description that masks, rollouts, caches and decoders share."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

# Pixel frames per latent frame of the Wan VAE; its first latent frame stands for one pixel frame alone.
TEMPORAL_STRIDE = 4


@dataclass(frozen=True)
class ChunkLayout:
    """Latent frames per chunk. Chunks beyond the last one repeat its length, so a layout also describes endless video.

    `chunks` and `frames` count what is listed; `length`, `start`, `end` and `chunk_of` go on beyond it.

    Args:
        lengths: latent frames of each chunk, at least one chunk of at least one frame.

    Raises:
        ValueError: no chunks, or a chunk without frames.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) == 0 or any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths are {list(self.lengths)}, but must be at least one chunk of at least 1 frame")
        object.__setattr__(self, "lengths", tuple(int(length) for length in self.lengths))

    @classmethod
    def uniform(cls, frames: int, chunk: int) -> ChunkLayout:
        """Chunks of the same length.

        Raises:
            ValueError: the frames do not divide into chunks.
        """
        if chunk < 1 or frames < chunk or frames % chunk:
            raise ValueError(
                f"{frames} frames do not divide into chunks of {chunk}: use a multiple, or ChunkLayout.first(frames, "
                "chunk, remainder)"
            )
        return cls((chunk,) * (frames // chunk))

    @classmethod
    def first(cls, frames: int, chunk: int, first: int) -> ChunkLayout:
        """A first chunk of its own length (one frame for an image, or the remainder), then equal ones.

        Raises:
            ValueError: the frames after the first chunk do not divide into chunks.
        """
        if min(chunk, first) < 1 or frames < first or (frames - first) % chunk:
            raise ValueError(
                f"{frames} frames are no first chunk of {first} and then chunks of {chunk}: {frames} - {first} must be "
                f"a multiple of {chunk}, 0 included"
            )
        return cls((first,) + (chunk,) * ((frames - first) // chunk))

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(self.lengths))

    @property
    def chunks(self) -> int:
        """Number of listed chunks."""
        return len(self.lengths)

    @property
    def frames(self) -> int:
        """Latent frames of the listed chunks."""
        return self._ends[-1]

    @property
    def longest(self) -> int:
        """Latent frames of the longest chunk."""
        return max(self.lengths)

    def length(self, chunk: int) -> int:
        """Latent frames of a chunk. Raises ValueError below 0."""
        if chunk < 0:
            raise ValueError(f"chunks are counted from 0, got {chunk}")
        return self.lengths[min(chunk, self.chunks - 1)]

    def end(self, chunk: int) -> int:
        """The frame after the last one of a chunk. Raises ValueError below 0."""
        length = self.length(chunk)
        return self._ends[chunk] if chunk < self.chunks else self.frames + (chunk + 1 - self.chunks) * length

    def start(self, chunk: int) -> int:
        """First frame of a chunk. Raises ValueError below 0."""
        return self.end(chunk) - self.length(chunk)

    def chunk_of(self, frame: int) -> int:
        """The chunk that holds a frame. Raises ValueError below 0."""
        if frame < 0:
            raise ValueError(f"frames are counted from 0, got {frame}")
        if frame < self.frames:
            return bisect_right(self._ends, frame)
        return self.chunks + (frame - self.frames) // self.lengths[-1]

    def tokens(self, tokens_per_frame: int) -> tuple[int, ...]:
        """Tokens of each listed chunk. Raises ValueError for fewer than one token a frame."""
        if tokens_per_frame < 1:
            raise ValueError(f"a frame has at least 1 token, got {tokens_per_frame}")
        return tuple(length * tokens_per_frame for length in self.lengths)

    def pixel_frames(self, chunk: int, stride: int = TEMPORAL_STRIDE) -> int:
        """Pixel frames a causal VAE emits for a chunk: the first latent frame of a video gives one, others `stride`.

        Raises:
            ValueError: a chunk below 0 or a stride below 1.
        """
        if stride < 1:
            raise ValueError(f"the temporal stride is at least 1, got {stride}")
        return stride * self.length(chunk) - (stride - 1 if chunk == 0 else 0)

    def extended(self, chunks: int) -> ChunkLayout:
        """The first `chunks` chunks, the last length repeated where the list ends. Raises ValueError below 1."""
        if chunks < 1:
            raise ValueError(f"a layout has at least 1 chunk, got {chunks}")
        return ChunkLayout(tuple(self.length(chunk) for chunk in range(chunks)))

    def require_longer(self, longest_frames: int, new_frames: int) -> None:
        """Raise ValueError, in words of self_forcing, unless rollouts of up to that many frames are whole chunks beyond
        the listed ones, and the new frames at their end whole chunks among the equal ones at the end of the list."""
        chunk, extra = self.lengths[-1], longest_frames - self.frames
        if extra < chunk or extra % chunk:
            raise ValueError(
                f"self_forcing.longest_frames is {longest_frames}; it must be the {self.frames} frames of "
                f"student.layout and one or more chunks of {chunk}"
            )
        equal = sum(1 for _ in itertools.takewhile(lambda length: length == chunk, reversed(self.lengths)))
        if not chunk <= new_frames < self.frames or new_frames % chunk or new_frames > equal * chunk:
            raise ValueError(
                f"self_forcing.new_frames is {new_frames}; it must be whole chunks of {chunk} frames, fewer than the "
                f"{self.frames} of the teacher's window, and among the {equal} equal chunks at the end of "
                "student.layout"
            )
