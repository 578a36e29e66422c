"""Films: written frame by frame, read back, and refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.core.media import videos
from fewstep.core.media.videos import iterate_frames, read_video, write_film


def moving_square(frames: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    pictures = []
    for number in range(frames):
        frame = np.full((height, width, 3), 40, dtype=np.uint8)
        frame[8:20, 2 * number : 2 * number + 10] = (200, 120, 60)
        pictures.append(frame)
    return pictures


def read_whole_video(path: Path) -> torch.Tensor:
    """All frames [3, T, H, W] in [0, 1]."""
    frames = [np.asarray(picture) for picture in iterate_frames(path)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 255


def test_a_film_comes_back(tmp_path: Path) -> None:
    frames = moving_square(9)
    film = write_film(iter(frames), tmp_path / "deep" / "a.mp4", rate=8)
    back = read_whole_video(film)
    assert back.shape == (3, 9, 32, 48)
    expected = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 255
    assert (back - expected).abs().mean() < 0.02
    assert read_video(film, frames=4, height=16, width=24, every=2).shape == (3, 4, 16, 24)


def test_the_same_frames_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_film(moving_square(5), tmp_path / name, rate=8) for name in ("a.mp4", "b.mp4"))
    assert first.read_bytes() == second.read_bytes()


def test_odd_sizes_are_filled_up(tmp_path: Path) -> None:
    film = write_film(moving_square(3, height=31, width=47), tmp_path / "a.mp4", rate=8)
    assert read_whole_video(film).shape == (3, 3, 32, 48)


def test_what_is_not_whole_does_not_appear(tmp_path: Path) -> None:
    def broken():
        yield moving_square(1)[0]
        raise RuntimeError("the stream ended")

    with pytest.raises(RuntimeError, match="the stream ended"):
        write_film(broken(), tmp_path / "a.mp4", rate=8)
    with pytest.raises(ValueError, match="at least 1 frame"):
        write_film([], tmp_path / "a.mp4", rate=8)
    with pytest.raises(ValueError, match=r"a frame is uint8 \(16, 16, 3\) after uint8 \(32, 48, 3\)"):
        write_film([*moving_square(1), np.zeros((16, 16, 3), np.uint8)], tmp_path / "a.mp4", rate=8)
    assert list(tmp_path.iterdir()) == []


def test_broken_films_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"a.mp4 is no video that ffmpeg can read"):
        read_whole_video(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="there is no file"):
        read_whole_video(tmp_path / "b.mp4")


def test_without_ffmpeg_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs imageio-ffmpeg: pip install imageio-ffmpeg"):
        write_film(moving_square(1), tmp_path / "a.mp4", rate=8)


def test_frames_of_a_folder_are_in_natural_order(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    assert [picture.getpixel((0, 0)) for picture in iterate_frames(tmp_path)] == [(1, 0, 0), (2, 0, 0), (10, 0, 0)]


def test_a_long_film_needs_no_more_memory(tmp_path: Path) -> None:
    """Frames are made while they are written: 2,000 of 96 kB would be 192 MB in memory."""
    program = f"""
import resource, sys
import numpy as np
from pathlib import Path
from fewstep.core.media.videos import write_film
frames = (np.full((160, 200, 3), n % 251, np.uint8) for n in range(2000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_film(frames, Path({str(tmp_path / "a.mp4")!r}), rate=16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(made.stdout) < 40
