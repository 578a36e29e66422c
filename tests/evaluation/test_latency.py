"""Timing takes turns, leaves the warm-up out, and restores the thread count."""

import time
from dataclasses import dataclass

import pytest
import torch

from fewstep.evaluation.latency import TimingPlan, measure_latency


@dataclass
class SleepingCall:
    """Sleeps instead of drawing; the first call, which loads things, sleeps longer."""

    name: str
    images: int
    seconds: float
    log: list[str]
    threads: list[int]

    def run(self) -> object:
        first = self.name not in self.log
        self.log.append(self.name)
        self.threads.append(torch.get_num_threads())
        time.sleep(self.seconds + (0.1 if first else 0.0))
        return None


def test_turns_and_medians() -> None:
    log: list[str] = []
    threads: list[int] = []
    calls = [SleepingCall("a", 1, 0.01, log, threads), SleepingCall("b", 4, 0.04, log, threads)]
    before = torch.get_num_threads()
    a, b = measure_latency(calls, plan=TimingPlan(repeats=3, warmup=1, threads=1))
    assert log == ["a", "b"] * 4
    assert threads == [1] * 8
    assert torch.get_num_threads() == before
    assert a.seconds_per_image == pytest.approx(0.01, rel=0.5)
    assert b.seconds_per_image == pytest.approx(0.01, rel=0.5)
    assert b.images_per_second == pytest.approx(1.0 / b.seconds_per_image)
    assert b.fastest <= b.seconds_per_image <= b.slowest < 0.03
    assert (b.batch_size, b.repeats, b.threads, b.device) == (4, 3, 1, "CPU")


def test_bad_plans_are_errors() -> None:
    for options in ({"repeats": 0}, {"batch_size": 0}, {"threads": 0}, {"warmup": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            TimingPlan(**options)
    with pytest.raises(ValueError, match="nothing to time"):
        measure_latency([], plan=TimingPlan())
