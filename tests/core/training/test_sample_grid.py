from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.core.training.sample_grid import ROW_FRAMES, arrange, frame_row, save_grid


def test_grid_places_and_enlarges(tmp_path: Path) -> None:
    pixels = torch.zeros(3, 3, 8, 16)
    pixels[1, 0] = 1.0
    pixels[2, 2, 0, 0] = 2.0
    picture = arrange(list(pixels.split(2)))
    assert tuple(picture.shape) == (3, 2 * (8 * 4 + 2), 2 * (16 * 4 + 2))
    assert picture[:, 10, 5].tolist() == [0, 0, 0]
    assert picture[:, 10, 66 + 5].tolist() == [255, 0, 0]
    assert picture[:, 34 + 3, 3].tolist() == [0, 0, 255]
    assert picture[:, 34 + 4, 3].tolist() == [0, 0, 0]
    assert picture[:, 34 + 10, 66 + 5].tolist() == [255, 255, 255]
    path = save_grid(pixels, tmp_path / "deep" / "grid.png", columns=2)
    assert Image.open(path).size == (132, 68)
    rows = [pixels[:2], pixels[2:]]
    labelled = save_grid(rows, tmp_path / "labelled.png", labels=["teacher", "student"])
    width, height = Image.open(labelled).size
    assert height == 68
    assert width > 132
    assert labelled.read_bytes() == save_grid(rows, tmp_path / "b.png", labels=["teacher", "student"]).read_bytes()


def test_a_row_of_frames_has_the_first_and_the_last() -> None:
    video = torch.arange(25.0).view(1, 25, 1, 1).expand(3, 25, 4, 5)
    row = frame_row(video)
    assert row.shape == (ROW_FRAMES, 3, 4, 5)
    assert row[:, 0, 0, 0].tolist() == list(range(0, 25, 2))
    assert frame_row(video[:, :7])[:, 0, 0, 0].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (torch.zeros(2, 1, 4, 4), {}, "given shapes"),
        ([torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5)], {}, "one size for all rows"),
        (torch.full((1, 3, 4, 4), float("nan")), {}, "not finite"),
        (torch.zeros(2, 3, 4, 4), {"columns": 0}, "columns: given 0"),
        (torch.zeros(2, 3, 4, 4), {"labels": ["a", "b"]}, "given 2 for 1 rows"),
        ([], {}, "given shapes"),
    ],
)
def test_unusable_grids_are_refused(tmp_path: Path, pixels, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_grid(pixels, tmp_path / "grid.png", **options)
    assert list(tmp_path.iterdir()) == []
