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


def timed(stream: Iterator[ChunkOutput]) -> tuple[list[ChunkOutput], StreamSpeed]:
    """Take a stream to its end, and the times at which its chunks came. Raises ValueError for an empty stream."""
    began = time.perf_counter()
    outputs, arrivals = [], []
    for output in stream:
        arrivals.append(time.perf_counter() - began)
        outputs.append(output)
    return outputs, stream_speed(outputs, arrivals)


def stream_speed(outputs: Sequence[ChunkOutput], arrivals: Sequence[float]) -> StreamSpeed:
    """The speed of a stream whose chunks came at these times, in seconds. Raises ValueError for an empty stream."""
    if len(outputs) == 0:
        raise ValueError("the stream gave no chunks: nothing to time")
    last = outputs[-1]
    # Every latent frame after the first one of a video stands for four.
    frames = 4 * last.latents.shape[2] if last.frames is None else last.frames.shape[2]
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    seconds = median(gaps) if gaps else float("nan")
    return StreamSpeed(len(outputs), arrivals[0], seconds, frames, frames / seconds, last.frames is not None)
