from __future__ import annotations

import dataclasses
import json
import random

import pytest

from fewstep.core.training.health import HealthMonitor, HealthStatistics, HealthThresholds

WINDOW = 5
HEALTHY = HealthStatistics(
    student_mean=0.02,
    student_std=0.95,
    reference_mean=0.0,
    reference_std=1.0,
    fake_score_loss=0.22,
    fake_score_floor=0.2,
    direction_rms=0.1,
    student_grad_norm=1.0,
    student_grad_over_eps=2000.0,
    fake_grad_norm=2.0,
    diversity=0.5,
    brightness=0.48,
    reference_brightness=0.5,
    saturation=0.2,
    reference_saturation=0.22,
)


def monitor() -> HealthMonitor:
    return HealthMonitor(HealthThresholds(window=WINDOW))


def names_after(changes: dict[str, float], *, before: int = WINDOW, records: int = WINDOW) -> list[str]:
    """Messages of a run that is healthy for `before` records and then changed for `records`."""
    watched = monitor()
    found = [message for _ in range(before) for message in watched.update(HEALTHY)]
    assert len(found) == 0
    changed = dataclasses.replace(HEALTHY, **changes)
    return [message.name for _ in range(records) for message in watched.update(changed)]


def test_healthy_noise_raises_nothing() -> None:
    watched, generator = HealthMonitor(), random.Random(0)
    count = 0
    for _ in range(300):
        noisy = {
            name: value * (1 + 0.1 * (2 * generator.random() - 1))
            for name, value in dataclasses.asdict(HEALTHY).items()
        }
        count += len(watched.update(HealthStatistics(**noisy)))
    assert count == 0


def test_unmeasured_statistics_raise_nothing() -> None:
    watched = monitor()
    assert sum(len(watched.update(HealthStatistics())) for _ in range(3 * WINDOW)) == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"student_std": 0.70}, "student_std_low"),
        ({"student_std": 1.40}, "student_std_high"),
        ({"student_mean": 0.30}, "student_mean"),
        ({"student_mean": -0.30}, "student_mean"),
        ({"fake_score_loss": 0.31}, "fake_score_lags"),
        ({"direction_rms": 0.31}, "direction_grows"),
        ({"student_grad_over_eps": 90.0}, "grad_below_eps"),
        ({"diversity": 0.29}, "diversity_falls"),
        ({"brightness": 0.60}, "brightness"),
        ({"brightness": 0.40}, "brightness"),
        ({"saturation": 0.35}, "saturation"),
    ],
)
def test_lasting_change_raises_its_message_once_per_window(changes: dict[str, float], name: str) -> None:
    assert names_after(changes) == [name]
    # Due when the changed values are the majority of a window (third record), and once per window after that.
    assert names_after(changes, records=2) == []
    assert names_after(changes, records=3) == [name]
    assert names_after(changes, records=2 + 3 * WINDOW) == [name] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"student_std": 0.76},
        {"student_std": 1.32},
        {"student_mean": 0.24},
        {"fake_score_loss": 0.29},
        {"fake_score_loss": 0.1},
        {"direction_rms": 0.29},
        {"student_grad_over_eps": 110.0},
        {"direction_rms": 0.01},
        {"diversity": 0.31},
        {"diversity": 5.0},
        {"brightness": 0.57},
        {"saturation": 0.29},
        {"student_grad_norm": 19.0},
    ],
)
def test_changes_within_the_thresholds_raise_nothing(changes: dict[str, float]) -> None:
    assert names_after(changes, records=3 * WINDOW) == []


@pytest.mark.parametrize("name", ["student_grad_norm", "fake_grad_norm"])
def test_gradient_spike_is_told_at_once(name: str) -> None:
    assert names_after({name: 50.0}, records=1) == [f"{name}_spike"]
    assert names_after({name: 50.0}, before=WINDOW - 1, records=1) == []


def test_messages_say_what_is_seen_and_what_to_do() -> None:
    watched = monitor()
    sick = dataclasses.replace(HEALTHY, fake_score_loss=0.6, student_std=0.5)
    texts = {message.name: message.text for _ in range(WINDOW) for message in watched.update(sick)}
    assert len(texts) == 2
    assert "loss of the fake score is 0.6, 3 times its floor 0.2" in texts["fake_score_lags"]
    assert "raise its updates per student update" in texts["fake_score_lags"]
    assert "student samples is 0.5, the teacher's 1: samples flatten" in texts["student_std_low"]


def test_values_that_are_not_finite_are_told_and_left_out() -> None:
    watched = monitor()
    for _ in range(WINDOW):
        watched.update(HEALTHY)
    broken = dataclasses.replace(HEALTHY, diversity=float("nan"), student_std=float("inf"))
    messages = watched.update(broken)
    assert [message.name for message in messages] == ["not_finite"]
    assert messages[0].text.startswith("diversity, student_std not finite")
    assert watched.update(HEALTHY) == []


def test_state_goes_on_exactly() -> None:
    whole, first = monitor(), monitor()
    series = [HEALTHY] * 7 + [dataclasses.replace(HEALTHY, diversity=0.1, brightness=0.9)] * 20
    expected = [[message.name for message in whole.update(record)] for record in series]
    found = [[message.name for message in first.update(record)] for record in series[:11]]
    second = monitor()
    second.load_state(json.loads(json.dumps(first.state())))
    found += [[message.name for message in second.update(record)] for record in series[11:]]
    assert found == expected
    assert sum(len(names) for names in expected) == 8


def test_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window: given 1"):
        HealthMonitor(HealthThresholds(window=1))
