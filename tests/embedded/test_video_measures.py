"""Measures of clips against closed forms and against clips whose faults are known."""

from pathlib import Path

import pytest
import torch

from fewstep.embedded.moving_digits.clips import SPEEDS, moving_digits, render, small_digits, straight_positions
from fewstep.embedded.moving_digits.judges import VideoJudges, held_out_clips, load_judges
from fewstep.embedded.moving_digits.measures import (
    VideoReference,
    light_centres,
    measure_clips,
    motion_amount,
    segments,
    video_reference,
)

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "digits_video" / "judges"


@pytest.fixture(scope="module")
def judges() -> VideoJudges:
    return load_judges(SHIPPED)


@pytest.fixture(scope="module")
def reference(judges: VideoJudges) -> VideoReference:
    return video_reference(judges, moving_digits("test", seed=9, indices=range(120)).pixels)


def test_centre_of_light_of_one_pixel() -> None:
    pixels = torch.zeros(1, 3, 2, 32, 32)
    pixels[0, :, 0, 4:6, 7:9] = 1.0
    centres, lit = light_centres(pixels)
    assert centres[0].tolist() == [[5.0, 8.0], [0.0, 0.0]]
    assert lit.tolist() == [[True, False]]


@pytest.mark.parametrize("velocity", [(0.0, 0.25), (0.3, -0.4), (0.0, 0.0)])
def test_motion_of_a_straight_walk_is_its_speed(velocity: tuple[float, float]) -> None:
    start, step = (torch.tensor([values], dtype=torch.float64) for values in ((5.0, 10.0), velocity))
    clip = render(small_digits("test")[0][:1], straight_positions(start, step, 11))
    # Bilinear rendering from a grid of the same spacing moves the centre of light as much as the digit.
    assert motion_amount(clip) == pytest.approx(sum(v * v for v in velocity) ** 0.5, abs=5e-3)


def test_black_frames_have_no_part_in_motion() -> None:
    clips = moving_digits("test", seed=0, indices=range(4)).pixels.clone()
    whole = motion_amount(clips[:, :, :10])
    clips[:, :, 10:] = 0.0
    assert motion_amount(clips) == pytest.approx(whole, rel=1e-9)
    with pytest.raises(ValueError, match="no two consecutive frames"):
        motion_amount(torch.zeros(2, 3, 4, 32, 32))


def test_real_clips_score_near_the_ceiling(judges: VideoJudges, reference: VideoReference) -> None:
    clips = held_out_clips(120)
    result = measure_clips(judges, clips.pixels, prompts=clips.captions, reference=reference)
    assert (result.samples, result.frames, len(result.segment_accuracy)) == (120, 25, 5)
    assert min(result.digit_accuracy, result.direction_accuracy, result.speed_accuracy) > 0.96
    assert result.black_frames == 0.0
    assert SPEEDS[0] < result.motion < SPEEDS[1]
    assert result.motion == pytest.approx(result.reference_motion, rel=0.15)
    assert abs(result.drift) < 0.05


def test_faults_are_seen(judges: VideoJudges, reference: VideoReference) -> None:
    clips = held_out_clips(60)
    good = measure_clips(judges, clips.pixels, prompts=clips.captions, reference=reference, parts=2)
    frozen = clips.pixels[:, :, :1].expand(-1, -1, 25, -1, -1)
    still = measure_clips(judges, frozen, prompts=clips.captions, reference=reference, parts=2)
    assert still.motion == pytest.approx(0.0, abs=1e-9)
    assert still.direction_accuracy < 0.7
    assert still.clip_distance > 1.5 * good.clip_distance
    assert still.digit_accuracy == pytest.approx(good.digit_accuracy, abs=0.05)

    fading = clips.pixels * torch.linspace(1.0, 0.05, 25).view(1, 1, -1, 1, 1)
    faded = measure_clips(judges, fading, prompts=clips.captions, reference=reference)
    assert faded.segment_distance[-1] > 3.0 * faded.segment_distance[0]
    assert faded.drift > 0.1

    other = [text.replace("seven", "two").replace("left", "right") for text in clips.captions]
    wrong = measure_clips(judges, clips.pixels, prompts=other, reference=reference, parts=1)
    changed = sum("seven" in text for text in clips.captions) / 60
    assert wrong.digit_accuracy == pytest.approx(good.digit_accuracy - changed, abs=0.02)
    assert wrong.direction_accuracy == pytest.approx(1 - sum("left" in text for text in clips.captions) / 60, abs=0.02)


def test_segments_cover_every_frame_once() -> None:
    assert segments(25, 5) == [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 20), slice(20, 25)]
    assert segments(11, 3) == [slice(0, 3), slice(3, 6), slice(6, 11)]
    with pytest.raises(ValueError, match="3 frames cannot be cut into 4 parts"):
        segments(3, 4)


def test_prompts_must_fit(judges: VideoJudges, reference: VideoReference) -> None:
    clips = held_out_clips(2)
    with pytest.raises(ValueError, match="1 prompts for 2 clips"):
        measure_clips(judges, clips.pixels, prompts=clips.captions[:1], reference=reference)
    with pytest.raises(ValueError, match="must name exactly one of left, right, up, down"):
        measure_clips(judges, clips.pixels, prompts=["a seven"] * 2, reference=reference)
