"""Videos of a user's folder become latents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.core.latent_sources import encode_video_folder
from fewstep.core.media.videos import read_video
from fewstep.core.teacher import Teacher
from tests.tiny_videos import VIDEO_FRAMES, VIDEO_LATENTS, VIDEO_SIDE, build_video_pipeline


def grey(value: int, size: tuple[int, int] = (40, 40)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def write_frames(folder: Path, count: int) -> Path:
    """Frame i is grey of brightness 20 i; numbers are written so that text order is time order."""
    folder.mkdir(parents=True)
    for frame in range(count):
        grey(20 * frame).save(folder / f"{frame:03d}.png")
    return folder


def test_frames_of_a_folder_come_in_order(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "a", 10)
    (folder / "notes.txt").write_text("no picture")
    video = read_video(folder, frames=4, height=32, width=48, every=3)
    assert video.shape == (3, 4, 32, 48)
    assert (video.mean(dim=(0, 2, 3)) * 255).tolist() == pytest.approx([0.0, 60.0, 120.0, 180.0], abs=0.01)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations_are_read(tmp_path: Path, suffix: str) -> None:
    pictures = [grey(value) for value in (0, 100, 200, 250, 30)]
    file = tmp_path / f"a.{suffix}"
    lossless: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=50, **lossless)
    video = read_video(file, frames=3, height=16, width=16, every=2)
    assert video.shape == (3, 3, 16, 16)
    assert (video.mean(dim=(0, 2, 3)) * 255).tolist() == pytest.approx([0.0, 200.0, 30.0], abs=1.0)


def test_short_and_unreadable_videos_are_refused(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "a", 4)
    with pytest.raises(ValueError, match="has 4 frames; 3 frames, one of 2, need 5"):
        read_video(folder, frames=3, height=16, width=16, every=2)
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no animation")
    with pytest.raises(ValueError, match=r"film\.mp4 is no video that ffmpeg can read"):
        read_video(film, frames=1, height=16, width=16)
    with pytest.raises(ValueError, match="frames is 0 and every 1; use at least 1"):
        read_video(folder, frames=0, height=16, width=16)


def test_folder_becomes_latents_with_captions(tmp_path: Path) -> None:
    write_frames(tmp_path / "one", VIDEO_FRAMES)
    write_frames(tmp_path / "two", VIDEO_FRAMES + 2)
    rows = [{"file_name": "one", "text": "first"}, {"file_name": "two", "text": "second  one"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    teacher = Teacher(build_video_pipeline(), path="tiny")
    size = {"height": VIDEO_SIDE, "width": VIDEO_SIDE}
    dataset = encode_video_folder(teacher, tmp_path, frames=VIDEO_FRAMES, **size)
    assert dataset.latents.shape == (2, *VIDEO_LATENTS)
    assert dataset.prompts == ("first", "second one")
    expected = teacher.encode_pixels(read_video(tmp_path / "two", frames=VIDEO_FRAMES, **size)[None])
    assert torch.equal(dataset.latents[1:], expected)
    with pytest.raises(ValueError, match=r"frames must be 4 k \+ 1"):
        encode_video_folder(teacher, tmp_path, frames=VIDEO_FRAMES + 1, **size)
