"""Clips of moving digits: closed forms of their positions, captions, and what is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.embedded.digits.images import DIGIT_WORDS, label_of_prompt
from fewstep.embedded.moving_digits.clips import (
    ACTION_FRAMES,
    ACTION_HOLD,
    ACTION_SPEED,
    CANVAS,
    CLIP_FRAMES,
    DIRECTION_STEPS,
    DIRECTION_WORDS,
    REACH,
    SPEEDS,
    START_SPACING,
    all_clip_captions,
    balanced_clip_prompt,
    bounce,
    clip_caption,
    direction_of_prompt,
    moving_digits,
    render,
    small_digits,
    speed_of_prompt,
    steered_digits,
    steered_positions,
    straight_positions,
)

FINITE = st.floats(0.0, REACH, allow_nan=False)


def walk(start: float, velocity: float, steps: int) -> float:
    """Step by step between the walls, turning round at them: the slow way to `bounce`."""
    place, speed = start, velocity
    for _ in range(steps):
        place += speed
        if place < 0.0:
            place, speed = -place, -speed
        if place > REACH:
            place, speed = 2 * REACH - place, -speed
    return place


@given(start=FINITE, velocity=st.floats(-3.0, 3.0), steps=st.integers(0, 60))
def test_position_after_k_frames_is_the_walk(start: float, velocity: float, steps: int) -> None:
    one = torch.tensor([[start, 0.0]], dtype=torch.float64)
    step = torch.tensor([[velocity, 0.0]], dtype=torch.float64)
    found = straight_positions(one, step, steps + 1)[0, steps, 0].item()
    assert found == pytest.approx(walk(start, velocity, steps), abs=1e-9)


def test_bounce_in_numbers() -> None:
    places = bounce(torch.tensor([0.0, 15.0, 16.0, 17.0, 32.0, 33.0, -1.0, -17.0]), 16.0)
    assert places.tolist() == [0.0, 15.0, 16.0, 15.0, 0.0, 1.0, 1.0, 15.0]


def test_directions_are_visible_and_slow_digits_do_not_bounce() -> None:
    clips = moving_digits("train", seed=3, indices=range(200))
    assert clips.pixels.shape == (200, 3, 25, 32, 32)
    assert clips.positions.shape == (200, 25, 2)
    assert clips.positions.min() >= 0.0
    assert clips.positions.max() <= REACH
    moved = clips.positions.diff(dim=1)
    unit = torch.tensor(DIRECTION_STEPS, dtype=torch.float64)[clips.directions]
    speed = torch.tensor(SPEEDS, dtype=torch.float64)[clips.speeds]
    ahead = (moved * unit[:, None]).sum(dim=-1)
    # 12 frames straight ahead whatever the speed; all of them when slow.
    assert (ahead[:, :12] - speed[:, None]).abs().max() < 1e-9
    assert (ahead[clips.speeds == 0] - SPEEDS[0]).abs().max() < 1e-9
    assert (ahead[clips.speeds == 1] < 0).any()
    starts = clips.positions[:, 0]
    assert starts.remainder(START_SPACING).abs().max() == 0
    assert {tuple(start) for start in starts.tolist()} == {
        (4.0 * top, 4.0 * left)
        for top in range(5)
        for left in range(5)
        # Nobody starts away from all walls, for there is one behind each.
        if (top, left) != (2, 2)
    }


def test_choices_are_uniform_and_captions_name_them() -> None:
    clips = moving_digits("train", seed=0, indices=range(2000), frames=1)
    assert clips.labels.bincount().min() > 160
    assert clips.directions.bincount().min() > 440
    assert clips.speeds.bincount().min() > 930
    assert [label_of_prompt(text) for text in clips.captions] == clips.labels.tolist()
    assert [direction_of_prompt(text) for text in clips.captions] == clips.directions.tolist()
    assert [speed_of_prompt(text) for text in clips.captions] == clips.speeds.tolist()
    assert len(set(clips.captions)) == 320


def test_a_clip_depends_on_seed_and_index_alone() -> None:
    together, alone = moving_digits("test", seed=5, indices=[7, 900, 3]), moving_digits("test", seed=5, indices=[900])
    assert torch.equal(together.pixels[1:2], alone.pixels)
    assert together.captions[1] == alone.captions[0]
    assert not torch.equal(moving_digits("test", seed=6, indices=[900]).pixels, alone.pixels)
    shorter = moving_digits("test", seed=5, indices=[900], frames=9)
    assert torch.equal(shorter.pixels, alone.pixels[:, :, :9])
    with pytest.raises(ValueError, match="frames is 0; a clip has at least 1"):
        moving_digits("test", seed=5, indices=[1], frames=0)


def test_splits_share_no_digit() -> None:
    seen = {digit.numpy().tobytes() for digit in small_digits("train")[0]}
    assert len(seen) == 1297
    assert sum(digit.numpy().tobytes() in seen for digit in small_digits("test")[0]) == 0


@given(top=st.integers(0, REACH), left=st.integers(0, REACH))
@settings(max_examples=20)
def test_whole_positions_copy_the_digit(top: int, left: int) -> None:
    digit = small_digits("train")[0][:1]
    drawn = render(digit, torch.tensor([[[float(top), float(left)]]]))
    assert drawn.shape == (1, 3, 1, CANVAS, CANVAS)
    assert (drawn[0, 0, 0, top : top + 16, left : left + 16] - digit[0]).abs().max() < 1e-5
    assert drawn[0, 0].sum().item() == pytest.approx(digit.sum().item(), rel=1e-4)


def test_half_a_pixel_is_the_mean_of_neighbours() -> None:
    digit = small_digits("train")[0][:1]
    half, low, high = (render(digit, torch.tensor([[[4.0, left]]])) for left in (6.5, 6.0, 7.0))
    assert (half - (low + high) / 2).abs().max() < 1e-5
    assert (low - high).abs().max() > 0.1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), FINITE, FINITE)
def test_steered_digit_follows_its_actions(actions: list[int], top: float, left: float) -> None:
    table = ((0.0, 0.0), *DIRECTION_STEPS)
    place, expected = [top, left], [[top, left]]
    for action in actions:
        place = [min(max(x + ACTION_SPEED * d, 0.0), REACH) for x, d in zip(place, table[action], strict=True)]
        expected.append(place)
    found = steered_positions(torch.tensor([[top, left]], dtype=torch.float64), torch.tensor([[0, *actions]]))
    assert (found[0] - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9


def test_steered_clips_hold_their_actions() -> None:
    clips = steered_digits("train", seed=1, indices=range(200), frames=49)
    assert clips.pixels.shape == (200, 3, 49, 32, 32)
    assert clips.actions.shape == (200, 49)
    assert clips.actions[:, 0].abs().max() == 0
    assert clips.actions.flatten().bincount().min() > 0.15 * clips.actions.numel()
    assert set(clips.captions) == {f"a {word}" for word in DIGIT_WORDS}
    changes = (clips.actions[:, 1:].diff(dim=1) != 0).sum().item() / 200
    # 48 frames in pieces of 8 on average, a fifth of which repeat the action before.
    assert 3.5 < changes < 5.5
    assert clips.actions[:, 1:].unflatten(1, (12, ACTION_FRAMES)).diff(dim=2).abs().max() == 0
    first = torch.stack([(row != row[0]).long().argmax() for row in clips.actions[:, 1:] if (row != row[0]).any()])
    assert first.min() == ACTION_HOLD[0] * ACTION_FRAMES
    again = steered_digits("train", seed=1, indices=[17], frames=49)
    assert torch.equal(again.actions[0], clips.actions[17])
    assert torch.equal(again.pixels[0], clips.pixels[17])


def test_wrong_actions_are_refused() -> None:
    start = torch.zeros(1, 2, dtype=torch.float64)
    for actions in ([[0, 5]], [[0, -1]], [[1, 0]]):
        with pytest.raises(ValueError, match=r"actions must be 0 to 4 and start with 0 \(none\)"):
            steered_positions(start, torch.tensor(actions))


def test_captions_are_complete_and_balanced() -> None:
    captions = all_clip_captions()
    assert len(captions) == len(set(captions)) == 320
    assert clip_caption(7, 0, 1, 0) == "a seven moving left quickly"
    prompts = [balanced_clip_prompt(index) for index in range(320)]
    assert torch.tensor([direction_of_prompt(text) for text in prompts]).bincount().tolist() == [80] * 4
    assert [label_of_prompt(text) for text in prompts[:10]] == list(range(10))
    with pytest.raises(ValueError, match="must name exactly one of left, right, up, down"):
        direction_of_prompt("a seven moving left and right quickly")
    with pytest.raises(ValueError, match="must name exactly one of slowly, quickly"):
        speed_of_prompt("a seven moving left")
    assert len(DIRECTION_WORDS) == 4
    assert CLIP_FRAMES == 25
