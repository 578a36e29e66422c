"""What is said of a reward run: hacking in words, and how far apart samples of a prompt are."""

import math

import pytest
import torch

from fewstep.dmd.reward_watch import HackingMonitor, group_distance


def monitor(rows: list[tuple[float, ...]], *, patience: int = 2) -> HackingMonitor:
    found = HackingMonitor(("judge", "ink"), patience)
    for reward, *held_out in rows:
        found = found.updated(reward, held_out)
    return found


def test_a_rising_reward_with_a_falling_judge_is_told() -> None:
    rows = [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4), (0.3, 0.7, 0.5)]
    assert monitor(rows).falling() == ("judge",)
    message = monitor(rows).message()
    assert message is not None
    assert message.startswith(
        "the trained reward rose from 0 to 0.3 while judge fell from 0.9 to 0.7 in 2 measurements"
    )
    assert "raise objective.matching_weight or the kl_weight" in message


@pytest.mark.parametrize(
    "rows",
    [
        [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4)],
        [(0.3, 0.9, 0.3), (0.1, 0.8, 0.4), (0.0, 0.7, 0.5)],
        [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4), (0.3, 0.85, 0.5)],
        [(0.0, 0.5, 0.3), (0.1, 0.8, 0.4), (0.3, 0.7, 0.5)],
    ],
)
def test_less_than_that_is_not(rows: list[tuple[float, ...]]) -> None:
    """Too few measurements, a reward that falls, a judge that recovers, a judge that fell once."""
    assert monitor(rows).falling() == ()
    assert monitor(rows).message() is None


def test_only_the_latest_measurements_count() -> None:
    rows = [(0.0, 0.9, 0.9), (0.1, 0.8, 0.8), (0.3, 0.7, 0.7), (0.4, 0.95, 0.6), (0.5, 0.9, 0.5)]
    assert monitor(rows).falling() == ("ink",)
    assert monitor(rows, patience=4).falling() == ("ink",)
    with pytest.raises(ValueError, match="1 scores for the held-out scorers judge, ink"):
        monitor(rows).updated(1.0, [0.5])


def test_distance_between_samples_of_a_prompt() -> None:
    """Independent standard normals differ by sqrt(2) per pixel; two constants by their difference."""
    pixels = torch.randn(30, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert group_distance(pixels, 3) == pytest.approx(math.sqrt(2), rel=0.01)
    flat = torch.tensor([0.1, 0.4, 0.2, 0.2]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert group_distance(flat, 2) == pytest.approx(0.15, rel=1e-6)
    assert group_distance(flat, 1) == 0.0
