"""Curves of videos against hand-made ones."""

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation.video.curves import video_curves


def frames(values: list[float], side: int = 8) -> list[Image.Image]:
    return [Image.fromarray(np.full((side, side, 3), value, np.uint8)) for value in values]


def test_change_and_bend_of_even_and_of_flickering_grey() -> None:
    even = video_curves(frames([10, 20, 30, 40, 50]))
    assert even.change.tolist() == [10.0] * 4
    assert even.bend.tolist() == [0.0] * 3
    assert even.flickering() == pytest.approx((255 - 10) / 255, abs=1e-9)
    assert even.drift("brightness") == 40.0
    flicker = video_curves(frames([10, 20, 10, 20, 10]))
    assert flicker.change.tolist() == [10.0] * 4
    # |10 - 2 * 20 + 10| / 2
    assert flicker.bend.tolist() == [10.0] * 3
    assert flicker.drift("brightness") == 0.0


def test_levels() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, 4:] = (60, 120, 30)
    one = video_curves([Image.fromarray(picture)] * 3)
    assert one.brightness[0] == pytest.approx(35.0)
    assert one.contrast[0] == pytest.approx(35.0)
    assert one.saturation[0] == pytest.approx(45.0)
    # Two columns of the inner six stand at an edge of 70 levels.
    assert one.sharpness[0] == pytest.approx(70.0 * 2 / 6, rel=1e-6)


def test_boundaries_of_chunks() -> None:
    jumps = video_curves(frames([10, 12, 14, 34, 36, 38, 58, 60]))
    assert jumps.boundary_ratio([0, 3, 6]) == pytest.approx(10.0)
    assert video_curves(frames([10, 12, 14, 16])).boundary_ratio([0, 2]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no chunk begins inside a video of 8 frames"):
        jumps.boundary_ratio([0, 8])


def test_short_videos_have_no_course() -> None:
    with pytest.raises(ValueError, match="a video of 2 frames has no course"):
        video_curves(frames([1, 2]))
