"""How fast a stream is: seconds until its first frames, and frames per second from then on.

The text is encoded when a session is opened, and counts in neither; a prompt is encoded once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from fewstep.causal_video.stream.state import ChunkOutput


@dataclass(frozen=True)
class StreamSpeed:
    """Times of a stream as its viewer meets them.

    Attributes:
        chunks: how many were taken.
        first_seconds: from asking to having the first chunk.
        chunk_seconds: median time between later chunks; NaN where there is one alone.
        frames_per_chunk: pixel frames of a later chunk.
        frames_per_second: the last two, divided.
        decodes: whether decoding is in these times.
    """

    chunks: int
    first_seconds: float
    chunk_seconds: float
    frames_per_chunk: int
    frames_per_second: float
    decodes: bool

    def text(self) -> str:
        """One line for people."""
        steady = ""
        if self.chunks > 1:
            steady = (
                f", then {1000 * self.chunk_seconds:.0f} ms a chunk of {self.frames_per_chunk} frames: "
                f"{self.frames_per_second:.1f} frames per second"
            )
        vae = "with" if self.decodes else "without"
        first = f"first chunk after {1000 * self.first_seconds:.0f} ms"
        return f"{first}{steady} ({vae} VAE, text encoder not counted)"


class TimedStream:
    """A stream that is passed on as it comes, and the times at which its chunks came; nothing of it is kept.

    What is done with a chunk before the next one is asked for, such as writing it, counts in no time. `frames` are the
    pixel frames that came.
    """

    def __init__(self, stream: Iterator[ChunkOutput]) -> None:
        self._stream = stream
        self._arrivals: list[float] = []
        self._last: ChunkOutput | None = None
        self.frames = 0

    def __iter__(self) -> Iterator[ChunkOutput]:
        waited = 0.0
        began = time.perf_counter()
        for output in self._stream:
            waited += time.perf_counter() - began
            self._arrivals.append(waited)
            self._last = output
            self.frames += 0 if output.frames is None else output.frames.shape[2]
            yield output
            began = time.perf_counter()

    @property
    def chunks(self) -> int:
        """How many came."""
        return len(self._arrivals)

    @property
    def speed(self) -> StreamSpeed:
        """Of what came. Raises ValueError where nothing did."""
        return stream_speed(self._last, self._arrivals)


def timed(stream: Iterator[ChunkOutput]) -> tuple[list[ChunkOutput], StreamSpeed]:
    """Take a stream to its end, and its speed. Raises ValueError for an empty stream."""
    passed = TimedStream(stream)
    return list(passed), passed.speed


def stream_speed(last: ChunkOutput | None, arrivals: Sequence[float]) -> StreamSpeed:
    """The speed of a stream whose chunks came at these times, in seconds. Raises ValueError for an empty stream."""
    if last is None:
        raise ValueError("the stream gave no chunks: nothing to time")
    # Every latent frame after the first one of a video stands for four.
    frames = 4 * last.latents.shape[2] if last.frames is None else last.frames.shape[2]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    seconds = median(gaps) if gaps else float("nan")
    return StreamSpeed(len(arrivals), arrivals[0], seconds, frames, frames / seconds, last.frames is not None)
