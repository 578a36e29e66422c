"""What the curves of causal consistency say: calls to a goal, differences over seeds, and parts of a stream."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from studies.drift import PartsJudge
from studies.forcing_curves import calls_to_reach, paired, summary_of

from fewstep.embedded.moving_digits.measures import VideoReference


def curve(*distances: float) -> list[dict[str, Any]]:
    return [{"calls": 100 * number, "1": value, "0.95": value, "0.8": value, "0.5": value} for number, value in
            enumerate(distances)]  # fmt: skip


def test_calls_to_a_goal_are_those_after_which_a_curve_stays_below() -> None:
    assert calls_to_reach(curve(4.0, 3.0, 1.0), "1", 2.0) == pytest.approx(150.0)
    # What goes below and comes back counts from where it stays.
    assert calls_to_reach(curve(4.0, 1.0, 3.0, 1.0), "1", 2.0) == pytest.approx(250.0)
    assert calls_to_reach(curve(4.0, 1.0, 3.0), "1", 2.0) is None
    assert calls_to_reach(curve(1.0, 1.5, 0.5), "1", 2.0) == 0.0


def test_intervals_are_students() -> None:
    """Of 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.3027, half 4.3027 / sqrt 3."""
    found = paired([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert not found.decided
    assert paired([1.9, 2.0, 2.1]).decided
    assert math.isinf(paired([1.0]).high)


def test_students_are_compared_with_the_one_of_their_seed() -> None:
    curves = {
        "tf_dcm": {seed: curve(4.0, 2.0 + seed) for seed in range(3)},
        "other": {seed: curve(4.0, 1.0 + seed) for seed in range(3)},
    }
    rows = [row for row in summary_of(curves) if row["variant"] == "other"]
    assert [row["time"] for row in rows] == ["1", "0.95", "0.8", "0.5"]
    # One below in each seed, though seeds differ by more.
    assert rows[0]["minus_tf_dcm"] == {"value": -1.0, "low": -1.0, "high": -1.0, "decided": True}
    assert rows[0]["last"] == 2.0
    assert rows[0]["calls_to_tf_dcm"] == pytest.approx([100 * 2 / 3, 50.0, 0.0], abs=1e-9)


class Judge:
    """Frames whose brightness times ten is their digit; features are random."""

    class frame:
        @staticmethod
        def features(frames: torch.Tensor) -> torch.Tensor:
            return torch.cat([frames.mean(dim=(1, 2, 3))[:, None], torch.randn(len(frames), 3)], dim=1)

        @staticmethod
        def head(features: torch.Tensor) -> torch.Tensor:
            return -(10 * features[:, :1] - torch.arange(10)).abs()


def test_a_stream_is_judged_in_parts_as_it_comes() -> None:
    torch.manual_seed(0)
    reference = VideoReference(torch.randn(50, 4).double(), torch.randn(5, 4).double(), 1.0)
    judges: Any = Judge()
    judge = PartsJudge(judges, reference, ["a three moving left slowly"] * 2, 8, 2)
    for digit, frames in ((3, 5), (4, 3)):
        judge(torch.full((2, 3, frames, 4, 4), digit / 10))
    assert [(row["frame"], row["accuracy"]) for row in judge.close()] == [(4, 1.0), (8, 0.25)]
