"""Steering against clips that follow their actions exactly, late, or not at all."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.embedded.moving_digits.clips import steered_digits
from fewstep.embedded.moving_digits.judges import VideoJudges, load_judges
from fewstep.embedded.moving_digits.steering import action_pieces, measure_steering

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "digits_video" / "judges"


@pytest.fixture(scope="module")
def judges() -> VideoJudges:
    return load_judges(SHIPPED)


def square(rows: list[int], columns: list[int]) -> Tensor:
    """One clip [1, 3, T, 32, 32] of a 2 x 2 square whose top left is at integer places."""
    pixels = torch.zeros(1, 3, len(rows), 32, 32)
    for frame, (row, column) in enumerate(zip(rows, columns, strict=True)):
        pixels[0, :, frame, row : row + 2, column : column + 2] = 1.0
    return pixels


def test_displacements_and_walls_of_a_square() -> None:
    # Right by four, then told up and staying, then told left, which would lead into the wall's margin.
    columns = [12, 13, 14, 15, 16, 16, 16, 16, 16, 16, 16, 16, 16]
    rows = [14] * 9 + [13, 12, 11, 10]
    actions = torch.tensor([[0] + [2] * 4 + [3] * 4 + [3] * 4])
    pieces = action_pieces(square(rows, columns), actions)
    assert pieces.actions.tolist() == [[2, 3, 3]]
    assert pieces.moved.tolist() == [[[0.0, 4.0], [0.0, 0.0], [-4.0, 0.0]]]
    assert pieces.seen.tolist() == [[2, 0, 3]]
    assert pieces.counts.tolist() == [[True, True, True]]
    near = action_pieces(square([14] * 5, [10] * 5), torch.tensor([[0, 1, 1, 1, 1]]))
    assert near.counts.tolist() == [[False]]
    dark = action_pieces(torch.zeros(1, 3, 5, 32, 32), torch.tensor([[0, 0, 0, 0, 0]]))
    assert dark.counts.tolist() == [[False]]


def test_clips_that_follow_exactly_are_judged_so(judges: VideoJudges) -> None:
    clips = steered_digits("test", seed=3, indices=range(60), frames=25)
    result = measure_steering(judges, clips.pixels, clips.actions, prompts=clips.captions)
    assert result.obeyed > 0.99
    assert result.stayed == 1.0
    assert result.speed == pytest.approx(1.0, abs=0.03)
    assert result.digit_accuracy > 0.95
    assert 0.4 < result.counted < 1.0
    assert len(result.segment_obeyed) == len(result.segment_accuracy) == 3
    # The same clips under the actions of others: one of five is right by chance, and pieces without one more often.
    others = measure_steering(judges, clips.pixels, clips.actions.roll(1, dims=0), prompts=clips.captions)
    assert others.obeyed < 0.4
    assert abs(others.speed) < 0.2


def test_bad_clips_are_refused(judges: VideoJudges) -> None:
    pixels = torch.rand(1, 3, 9, 32, 32)
    with pytest.raises(ValueError, match=r"clips have 8 frames"):
        action_pieces(pixels[:, :, :8], torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be \[1, 9\] numbers from 0 to 4"):
        action_pieces(pixels, torch.full((1, 9), 5))
    with pytest.raises(ValueError, match=r"must hold for the 4 frames"):
        action_pieces(pixels, torch.tensor([[0, 1, 1, 2, 2, 0, 0, 0, 0]]))
    with pytest.raises(ValueError, match=r"2 prompts for 1 clips"):
        measure_steering(judges, pixels, torch.zeros(1, 9, dtype=torch.int64), prompts=["a one", "a two"])
    dark = torch.zeros(1, 3, 17, 32, 32)
    with pytest.raises(ValueError, match=r"no piece counts"):
        measure_steering(judges, dark, torch.zeros(1, 17, dtype=torch.int64), prompts=["a one"])
