"""Step times of chunks, and exit steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.causal_video.schedule import StepSchedule, cycled_exit, random_exit


def test_both_ways_to_the_times_of_released_students() -> None:
    steps = StepSchedule.steps([4, 2])
    assert steps.of(0) == pytest.approx((1, 15 / 16, 5 / 6, 5 / 8), abs=1e-15)
    assert steps.of(1) == pytest.approx((1, 5 / 6), abs=1e-15)
    warped = StepSchedule.prefixes([1.0, 0.75, 0.5, 0.25], [4, 2], shift=5.0)
    assert warped.of(0) == pytest.approx(steps.of(0), abs=1e-15)
    assert warped.of(1) == pytest.approx((1, 15 / 16), abs=1e-15)


def test_the_last_entry_repeats() -> None:
    schedule = StepSchedule.steps([3, 1], shift=1.0)
    assert [len(schedule.of(chunk)) for chunk in range(5)] == [3, 1, 1, 1, 1]
    assert schedule.longest == 3


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=4), first=st.integers(0, 3), data=st.data())
def test_exits_stop_at_the_last_step_of_a_chunk(counts: list[int], first: int, data: st.DataObject) -> None:
    schedule = StepSchedule.steps(counts)
    exit_step = data.draw(st.integers(0, schedule.longest - 1))
    exits = schedule.exits(exit_step, 4, first=first)
    assert len(exits) == 4
    assert all(e == min(exit_step, len(schedule.of(first + i)) - 1) for i, e in enumerate(exits))


def test_exits_are_refused_where_there_are_none() -> None:
    schedule = StepSchedule.steps([4, 2])
    for exit_step, chunks in ((4, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="exit_step must be"):
            schedule.exits(exit_step, chunks)
    with pytest.raises(ValueError, match="counted from 0"):
        schedule.of(-1)
    with pytest.raises(ValueError, match="at least 0"):
        cycled_exit(schedule, -1)


def test_schedules_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one chunk"):
        StepSchedule(())
    with pytest.raises(ValueError, match="fall strictly"):
        StepSchedule(((0.5, 0.5),))
    with pytest.raises(ValueError, match="must be from 1 to 2"):
        StepSchedule.prefixes([1.0, 0.5], [3])


def test_exits_cycle_and_are_drawn_without_the_process() -> None:
    schedule = StepSchedule.steps([4, 2])
    assert [cycled_exit(schedule, i) for i in range(6)] == [0, 1, 2, 3, 0, 1]
    drawn = [random_exit(schedule, 7, step) for step in range(400)]
    # No rank enters, so two processes draw the same; each of the four steps is drawn often.
    assert drawn == [random_exit(schedule, 7, step) for step in range(400)]
    assert min(drawn.count(exit_step) for exit_step in range(4)) > 70
