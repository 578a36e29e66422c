"""What is said of a reward run: hacking in words, and how far apart samples of a prompt are."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.dmd.reward.config import MonitorConfig
from fewstep.dmd.reward.monitor import HackingMonitor, Measured, group_distance, held_out_metric

# Reward (ink) and held-out judge of a run of the study that was made to be hacked, steps 0, 10, ..., 80, written before
# there were errors. Of its 80 monitored samples that of the judge is at most 0.18, that of a sound run's ink 0.005.
HACKED_REWARD = (5.9695, 6.0993, 6.669, 7.6839, 9.2367, 11.14, 12.6081, 13.4818, 14.173)
HACKED_JUDGE = (-0.1035, -0.1043, -0.1033, -0.1149, -0.3014, -0.9739, -1.8512, -2.4286, -2.6445)
# A sound run with flash: the reward rises, and the ink moves by a percent about its start.
SOUND_REWARD = (-0.0566, -0.0521, -0.0378, -0.0296, -0.0259, -0.0233, -0.0213, -0.0199, -0.0188)
SOUND_INK = (0.2985, 0.299, 0.2983, 0.297, 0.2955, 0.2941, 0.2953, 0.2977, 0.2985)


def monitor(
    rows: Sequence[Sequence[float]], *, error: float = 0.0, patience: int = 2, tolerance: float = 2.0
) -> HackingMonitor:
    """Measurements of the reward, the judge and the ink, all with one standard error."""
    found = HackingMonitor(("judge", "ink"), patience, tolerance)
    for row in rows:
        reward, *held_out = (Measured(value, error) for value in row)
        found = found.updated(reward, held_out)
    return found


def told_at(reward: Sequence[float], judge: Sequence[float], errors: Sequence[float]) -> list[int]:
    """The measurements after which the monitor says something; the reward's error is a hundredth of it."""
    found, told = HackingMonitor(("judge",)), []
    for number, (value, score, error) in enumerate(zip(reward, judge, errors, strict=True)):
        found = found.updated(Measured(value, abs(value) / 100), [Measured(score, error)])
        if found.message() is not None:
            told.append(number)
    return told


def test_error_of_a_mean() -> None:
    measured = Measured.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert measured.mean == pytest.approx(3.0)
    assert measured.error == pytest.approx(math.sqrt(14 / 3) / 2)
    # 3 errors of the difference apart: sqrt(3^2 + 4^2) = 5.
    assert Measured(15.1, 3.0).above(Measured(0.0, 4.0), tolerance=3.0)
    assert not Measured(14.9, 3.0).above(Measured(0.0, 4.0), tolerance=3.0)
    with pytest.raises(ValueError, match="1 monitored samples have no standard error"):
        Measured.of(torch.tensor([1.0]))


def test_a_rising_reward_with_a_falling_judge_is_told() -> None:
    rows = [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4), (0.3, 0.7, 0.5)]
    assert monitor(rows).falling() == ("judge",)
    message = monitor(rows).message()
    assert message is not None
    assert message.startswith(
        "held-out judge fell from 0.9 to 0.7 in 2 measurements, in which the trained reward rose from 0 to 0.3; both"
    )
    assert "more than 2 standard errors" in message
    assert "raise the weight of what holds it" in message


@pytest.mark.parametrize(
    "rows",
    [
        [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4)],
        [(0.3, 0.9, 0.3), (0.1, 0.8, 0.4), (0.0, 0.7, 0.5)],
        [(0.0, 0.5, 0.3), (0.1, 0.8, 0.4), (0.3, 0.7, 0.5)],
        [(0.0, 0.5, 0.3), (0.3, 0.7, 0.4), (0.2, 0.6, 0.5), (0.25, 0.6, 0.5)],
    ],
)
def test_less_than_that_is_not(rows: list[tuple[float, ...]]) -> None:
    """Too few measurements, a reward that falls, a best that is too recent, a reward below that at the best."""
    assert monitor(rows).falling() == ()
    assert monitor(rows).message() is None


def test_both_sides_must_leave_their_noise() -> None:
    """The judge falls by 0.2, the reward rises by 0.3; the difference of two means has sqrt(2) times their error."""
    rows = [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4), (0.3, 0.7, 0.5)]
    limit = 0.2 / 2 / math.sqrt(2)
    assert monitor(rows, error=0.99 * limit).falling() == ("judge",)
    assert monitor(rows, error=1.01 * limit).falling() == ()
    assert monitor(rows, error=1.01 * limit, tolerance=1.9).falling() == ("judge",)
    slow = [(0.0, 0.9, 0.3), (0.1, 0.8, 0.4), (0.19, 0.5, 0.5)]
    assert monitor(slow, error=1.01 * limit).falling() == ()


def test_each_scorer_counts_from_its_own_best() -> None:
    rows = [(0.0, 0.9, 0.9), (0.1, 0.8, 0.8), (0.3, 0.7, 0.7), (0.4, 0.95, 0.6), (0.5, 0.9, 0.5)]
    assert monitor(rows).falling() == ("ink",)
    assert monitor(rows, patience=4).falling() == ("ink",)
    assert monitor(rows, patience=5).falling() == ()
    assert monitor([*rows, (0.6, 0.8, 0.5)]).falling() == ("judge", "ink")
    with pytest.raises(ValueError, match="1 scores for the held-out scorers judge, ink"):
        monitor(rows).updated(Measured(1.0, 0.0), [Measured(0.5, 0.0)])


def test_a_hacked_run_is_told_and_a_sound_one_is_not() -> None:
    """The first within three measurements of the judge's best."""
    assert told_at(HACKED_REWARD, HACKED_JUDGE, [0.2] * 9) == [5, 6, 7, 8]
    assert told_at(SOUND_REWARD, SOUND_INK, [0.005] * 9) == []
    # Without errors, as before there were any, the sound run was told of its ink.
    assert len(told_at(SOUND_REWARD, SOUND_INK, [0.0] * 9)) > 0


def test_a_neutral_random_walk_is_not_told() -> None:
    """Steps of a fifth of the error for 16 measurements, 200 seeds: the judge wanders, the reward rises."""
    generator = torch.Generator().manual_seed(0)
    steps = 0.2 * torch.randn(200, 16, generator=generator, dtype=torch.float64)
    rewards = [float(number) for number in range(1, 17)]
    told = [len(told_at(rewards, walk.tolist(), [1.0] * 16)) > 0 for walk in steps.cumsum(dim=1)]
    bare = [len(told_at(rewards, walk.tolist(), [0.0] * 16)) > 0 for walk in steps.cumsum(dim=1)]
    assert sum(told) <= 2
    assert sum(bare) > 150


@given(st.lists(st.floats(-1.4, 1.4), min_size=1, max_size=12))
def test_what_stays_within_its_noise_is_never_told(scores: list[float]) -> None:
    """A range below 2 sqrt(2) errors, whatever the order."""
    assert told_at([float(number + 1) for number in range(len(scores))], scores, [1.0] * len(scores)) == []


def test_metric_names_have_the_prefix_once() -> None:
    assert held_out_metric("held_out_log_probability") == "held_out_log_probability"
    assert held_out_metric("slant") == "held_out_slant"


def test_monitor_settings() -> None:
    with pytest.raises(ValueError, match="samples_per_prompt is 1; a spread needs at least 2"):
        MonitorConfig(prompts=1, samples_per_prompt=1)
    with pytest.raises(ValueError, match="all but tolerance must be at least 1"):
        MonitorConfig(tolerance=-1.0)


def test_distance_between_samples_of_a_prompt() -> None:
    """Independent standard normals differ by sqrt(2) per pixel; two constants by their difference."""
    pixels = torch.randn(30, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert group_distance(pixels, 3) == pytest.approx(math.sqrt(2), rel=0.01)
    flat = torch.tensor([0.1, 0.4, 0.2, 0.2]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert group_distance(flat, 2) == pytest.approx(0.15, rel=1e-6)
    assert group_distance(flat, 1) == 0.0
