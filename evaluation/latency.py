"""Seconds per image of stock pipeline calls.

Systems are timed in turns (A, B, C, A, B, C, ...), so that a change of the machine's load meets all of them alike. One
pipeline is in memory at a time: what has just been loaded is warmed up before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from tqdm import tqdm


class TimedCall(Protocol):
    """One stock call of a pipeline that makes `images` images; `run` returns when it has started the last kernel.

    `prepare` loads what the call needs, and tells whether that was loaded just now.
    """

    @property
    def images(self) -> int: ...

    def prepare(self) -> bool: ...

    def run(self) -> object: ...


@dataclass(frozen=True)
class TimingPlan:
    """How to time: `repeats` turns, `warmup` untimed calls of what was just loaded, batches of `batch_size`, `threads`
    CPU threads.

    threads None keeps what torch has. Raises ValueError for less than one repeat, image or thread.
    """

    repeats: int = 5
    warmup: int = 1
    batch_size: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        least = min(self.repeats, self.batch_size, 1 if self.threads is None else self.threads, self.warmup + 1)
        if least < 1:
            raise ValueError(f"{self}: repeats, batch_size and threads must be at least 1, warmup at least 0")


@dataclass(frozen=True)
class LatencyResult:
    """Medians over `repeats` turns; the fastest and the slowest turn stand beside them, in seconds per image."""

    seconds_per_image: float
    images_per_second: float
    fastest: float
    slowest: float
    repeats: int
    batch_size: int
    threads: int
    device: str


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_latency(calls: Sequence[TimedCall], *, plan: TimingPlan, device: str = "cpu") -> list[LatencyResult]:
    """Time each call in turns; one result per call, in their order. Raises ValueError for no calls."""
    if len(calls) == 0:
        raise ValueError("nothing to time; give at least one call")
    on_gpu = torch.device(device).type == "cuda"
    seconds: list[list[float]] = [[] for _ in calls]
    with _thread_count(plan.threads), tqdm(total=plan.repeats * len(calls), desc="timing") as bar:
        for turn in range(plan.repeats):
            for call, times in zip(calls, seconds, strict=True):
                loaded = call.prepare()
                for _ in range(plan.warmup if loaded or turn == 0 else 0):
                    call.run()
                if on_gpu:
                    torch.cuda.synchronize(device)
                started = time.perf_counter()
                call.run()
                if on_gpu:
                    torch.cuda.synchronize(device)
                times.append((time.perf_counter() - started) / call.images)
                bar.update()
        threads = torch.get_num_threads()
    return [
        LatencyResult(
            seconds_per_image=statistics.median(times),
            images_per_second=1.0 / statistics.median(times),
            fastest=min(times),
            slowest=max(times),
            repeats=plan.repeats,
            batch_size=call.images,
            threads=threads,
            device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        )
        for call, times in zip(calls, seconds, strict=True)
    ]
