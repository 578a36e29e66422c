"""The one reader of pictures: every kind of file shows what a viewer shows, or is refused by name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewstep.core.media import pictures
from fewstep.core.media.pictures import find_pictures, fit_picture, natural_order, open_picture, read_picture

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


def grey_of(path: Path) -> np.ndarray:
    """The red channel of what the reader shows; the three agree for grey."""
    values = np.asarray(open_picture(path)).astype(np.int64)
    assert (values == values[:, :, :1]).all()
    return values[:, :, 0]


def deep_png(path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)


def float_tiff(path: Path) -> None:
    Image.fromarray(RAMP.astype(np.float32) / 255.0).save(path)


def integer_tiff(path: Path) -> None:
    Image.fromarray(RAMP.astype(np.int32) * 257).save(path)


def palette_png(path: Path) -> None:
    Image.fromarray(RAMP).convert("P").save(path)


def one_frame_gif(path: Path) -> None:
    Image.fromarray(RAMP).save(path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (deep_png, "deep.png"),
        (deep_png, "deep.tif"),
        (float_tiff, "float.tiff"),
        (integer_tiff, "integer.tiff"),
        (palette_png, "palette.png"),
        (one_frame_gif, "one.gif"),
        (one_frame_gif, "plain.bmp"),
    ],
)
def test_grey_of_every_depth_shows_the_same(tmp_path: Path, write: Callable[[Path], None], name: str) -> None:
    write(tmp_path / name)
    assert np.abs(grey_of(tmp_path / name) - RAMP).max() == 0


@pytest.mark.parametrize("values", [np.array([[2.0, 0.5]]), np.array([[np.nan, 0.5]]), np.array([[-0.1, 0.5]])])
def test_floats_outside_the_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=r"a.tiff holds grey values .* those from 0 to 1 are read: scale it"):
        open_picture(tmp_path / "a.tiff")


def test_the_orientation_of_the_camera_is_applied(tmp_path: Path) -> None:
    picture = Image.fromarray(np.stack([RAMP[:4]] * 3, axis=2))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    shown = open_picture(tmp_path / "turned.png")
    assert shown.size == (4, 8)
    assert np.array_equal(np.asarray(shown)[:, :, 0], np.rot90(RAMP[:4], -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_and_hide_their_colour(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 2, 4))
    picture.convert(mode).save(tmp_path / "a.png")
    shown = np.asarray(open_picture(tmp_path / "a.png"))
    assert shown[:, :2].max() == 0
    assert shown[:, 2:].min() == 255


def test_print_colours_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    red = np.asarray(open_picture(tmp_path / "a.tif"))[0, 0]
    assert red[0] > 200
    assert red[1:].max() < 60


def test_animations_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.roll(RAMP, shift, 1)) for shift in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a.gif holds 3 pictures; a picture file has one"):
        open_picture(tmp_path / "a.gif")


def test_a_file_that_claims_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 63)
    with pytest.raises(ValueError, match=r"claims 8 x 8 pixels, at most 63"):
        open_picture(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MOST_PIXELS", 10**9)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="is no whole picture"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"text"])
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.png is no whole picture that PIL can read"):
        open_picture(tmp_path / "a.png")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut.png is no whole picture"):
        read_picture(tmp_path / "cut.png", 8, 8)


def test_folders_in_folders_are_listed_in_natural_order(tmp_path: Path) -> None:
    for name in ("b/10.png", "b/2.PNG", "b/1.jpeg", "a/x.webp", "a/._x.webp", ".hidden/1.png", "c.bmp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in find_pictures(tmp_path)]
    assert found == ["a/x.webp", "b/1.jpeg", "b/2.PNG", "b/10.png", "c.bmp"]


def test_folders_that_cannot_be_read_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 pictures"):
        find_pictures(tmp_path)
    with pytest.raises(ValueError, match="there is no directory"):
        find_pictures(tmp_path / "nowhere")
    for name in ("a.png", "b.heic"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.heic is a .heic picture, which is not read"):
        find_pictures(tmp_path)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=6))
def test_numbers_in_names_sort_as_numbers(numbers: list[int]) -> None:
    names = [f"frame{number}.png" for number in numbers]
    assert sorted(names, key=natural_order) == [f"frame{number}.png" for number in sorted(numbers)]


def test_the_middle_is_kept() -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 255
    picture = fit_picture(Image.fromarray(wide), 4, 4)
    assert picture.shape == (3, 4, 4)
    assert float(picture.min()) == 1.0


def test_links_to_folders_above_are_not_walked_again(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "self").symlink_to(tmp_path)
    assert [path.name for path in find_pictures(tmp_path)] == ["a.png"]
