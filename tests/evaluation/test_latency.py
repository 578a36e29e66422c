"""Timing takes turns, warms up what was just loaded, and restores the thread count."""

import time
from dataclasses import dataclass

import pytest
import torch

from fewstep.evaluation.latency import TimingPlan, measure_latency


@dataclass
class SleepingCall:
    """Sleeps instead of drawing; the first call after loading sleeps longer. One of them is loaded at a time."""

    name: str
    images: int
    seconds: float
    log: list[str]
    threads: list[int]
    loaded: list[str]

    def prepare(self) -> bool:
        fresh = self.loaded != [self.name]
        self.loaded[:] = [self.name]
        if fresh:
            self.log.append(f"load {self.name}")
        return fresh

    def run(self) -> object:
        first = bool(self.log) and self.log[-1].startswith("load")
        self.log.append(self.name)
        self.threads.append(torch.get_num_threads())
        time.sleep(self.seconds + (0.1 if first else 0.0))
        return None


def test_turns_and_medians() -> None:
    log: list[str] = []
    threads: list[int] = []
    loaded: list[str] = []
    calls = [SleepingCall("a", 1, 0.01, log, threads, loaded), SleepingCall("b", 4, 0.04, log, threads, loaded)]
    before = torch.get_num_threads()
    a, b = measure_latency(calls, plan=TimingPlan(repeats=3, warmup=1, threads=1))
    assert log == ["load a", "a", "a", "load b", "b", "b"] * 3
    assert threads == [1] * 12
    assert torch.get_num_threads() == before
    assert a.seconds_per_image == pytest.approx(0.01, rel=0.5)
    assert b.seconds_per_image == pytest.approx(0.01, rel=0.5)
    assert b.images_per_second == pytest.approx(1.0 / b.seconds_per_image)
    assert b.fastest <= b.seconds_per_image <= b.slowest < 0.03
    assert (b.batch_size, b.repeats, b.threads, b.device) == (4, 3, 1, "CPU")
    # What stays loaded is warmed up once.
    log.clear()
    measure_latency([calls[1], calls[1]], plan=TimingPlan(repeats=2, warmup=1))
    assert log == ["b"] * 6


def test_bad_plans_are_errors() -> None:
    for options in ({"repeats": 0}, {"batch_size": 0}, {"threads": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            TimingPlan(**options)
    with pytest.raises(ValueError, match="nothing to time"):
        measure_latency([], plan=TimingPlan())
