"""The judges of moving digits: what they take, how they are made, and that the shipped ones are as good as recorded."""

import json
from pathlib import Path

import pytest
import torch

from fewstep.embedded.moving_digits.clips import moving_digits
from fewstep.embedded.moving_digits.judges import (
    ClipJudge,
    FrameJudge,
    JudgesRecord,
    clip_logits,
    frame_logits,
    frames_of,
    held_out_clips,
    judge_accuracies,
    load_judges,
    save_judges,
    train_judges,
)

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "digits_video" / "judges"


def read_record(folder: Path) -> JudgesRecord:
    """What was written beside the weights."""
    return JudgesRecord(**json.loads((folder / "judges.json").read_text(encoding="ascii")))


def test_shipped_judges_are_as_good_as_recorded() -> None:
    record = read_record(SHIPPED)
    assert (record.test_clips, record.steps) == (1000, 700)
    assert min(record.digit, record.direction, record.speed) >= 0.99
    clips = held_out_clips(200)
    digit, frame_digit, direction, speed = judge_accuracies(load_judges(SHIPPED), clips)
    # The first 200 of the 1,000 clips of the record; each figure is a multiple of a fraction of these.
    assert digit == pytest.approx(record.digit, abs=0.02)
    assert frame_digit == pytest.approx(record.frame_digit, abs=0.02)
    assert (direction, speed) == pytest.approx((record.direction, record.speed), abs=0.01)


def test_direction_is_judged_by_motion_and_not_by_place() -> None:
    judges, clips = load_judges(SHIPPED), held_out_clips(64)
    slow = clips.speeds == 0
    backwards = clips.pixels[slow].flip(2)
    said = clip_logits(judges.clip, backwards).directions.argmax(dim=1)
    # left <-> right, up <-> down
    opposite = torch.tensor([1, 0, 3, 2])[clips.directions[slow]]
    assert (said == opposite).double().mean() > 0.8


def test_shapes_and_refusals() -> None:
    frame, clip = FrameJudge(), ClipJudge()
    clips = moving_digits("train", seed=0, indices=range(2), frames=30)
    assert frames_of(clips.pixels).shape == (60, 3, 32, 32)
    assert torch.equal(frames_of(clips.pixels)[31], clips.pixels[1, :, 1])
    assert frame_logits(frame, clips.pixels).shape == (2, 30, 10)
    said = clip_logits(clip, clips.pixels)
    assert (said.digits.shape, said.directions.shape, said.speeds.shape) == ((2, 10), (2, 4), (2, 2))
    with pytest.raises(ValueError, match=r"the clip judge takes \[B, 3, 25, 32, 32\]"):
        clip(clips.pixels)
    with pytest.raises(ValueError, match=r"the frame judge takes \[B, 3, 32, 32\]"):
        frame(clips.pixels)
    with pytest.raises(ValueError, match="steps is 0; use at least 1"):
        train_judges(0, 0)
    with pytest.raises(ValueError, match="no weights of judges at"):
        load_judges("nowhere")


@pytest.mark.slow
def test_training_repeats_and_survives_a_file(tmp_path: Path) -> None:
    (judges, record), (again, _) = (train_judges(1, 2, test_clips=8) for _ in range(2))
    assert (record.steps, record.test_clips) == (2, 8)
    save_judges(judges, record, path=tmp_path)
    loaded = load_judges(tmp_path)
    assert read_record(tmp_path) == record
    count = 0
    for mine, theirs, third in ((judges.frame, again.frame, loaded.frame), (judges.clip, again.clip, loaded.clip)):
        for name, weight in mine.state_dict().items():
            assert torch.equal(weight, theirs.state_dict()[name]), name
            assert torch.equal(weight, third.state_dict()[name]), name
            count += weight.numel()
    assert count > 400_000
