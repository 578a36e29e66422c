"""The scripts on a tiny student: what they write and print, and mistakes in one line."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.causal_video.tiny_streams import action_pipeline, text_pipeline

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the tiny student."""
    folder = tmp_path_factory.mktemp("student")
    text_pipeline().save_pretrained(folder)
    return folder


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """Run a script in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def test_a_stream_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "a.gif", tmp_path / "a.png"
    Image.fromarray(np.full((48, 40, 3), 90, dtype=np.uint8)).save(picture)
    options = ("--model", str(model), "--prompt", "a red cat", "--chunks", "4", "--output", str(output))
    more = ("--switch", "2:two dogs", "--switch", "3:blue 7", "--mode", "hard", "--scale", "2", "--image", str(picture))
    run_script(monkeypatch, "stream_video.py", *options, *more, "--pipelined")
    said = capsys.readouterr().out
    # Chunks 2 and 3 are cuts, whose first latent frame is one pixel frame.
    assert f"{output}: 11 frames in 4 chunks; first chunk after" in said
    assert "(with VAE, text encoder not counted)" in said
    with Image.open(output) as video:
        assert video.size == (64, 64)


def test_a_steered_stream_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steered = tmp_path / "steered"
    action_pipeline().save_pretrained(steered)
    options = ("--model", str(steered), "--prompt", "a red cat", "--output", str(tmp_path / "a.gif"), "--chunks", "3")
    run_script(monkeypatch, "stream_video.py", *options, "--actions", "left", "up")
    assert "a.gif: 17 frames in 3 chunks" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: the network takes 4 conditioning channels"):
        run_script(monkeypatch, "stream_video.py", *options)
    with pytest.raises(SystemExit, match="error: 3 chunks take 1 to 3 actions, got 4"):
        run_script(monkeypatch, "stream_video.py", *options, "--actions", *["left"] * 4)
    with pytest.raises(SystemExit, match="is steered by actions"):
        run_script(monkeypatch, "benchmark_streaming.py", "--model", str(steered))


def test_mistakes_are_one_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", str(model), "--prompt", "a red cat", "--output", str(tmp_path / "a.gif"))
    with pytest.raises(SystemExit, match="error: a switch is CHUNK:PROMPT"):
        run_script(monkeypatch, "stream_video.py", *options, "--switch", "two dogs")
    with pytest.raises(SystemExit, match=r"error: .* is no directory"):
        run_script(monkeypatch, "play_world.py", "--model", str(tmp_path / "none"), "--prompt", "a")
    with pytest.raises(SystemExit, match=r"error: .* does not exist; give the directory of a run"):
        run_script(monkeypatch, "export_causal_video.py", "--run", str(tmp_path))
    with pytest.raises(SystemExit, match=r"error: .* is no directory"):
        run_script(monkeypatch, "benchmark_streaming.py", "--model", str(tmp_path / "none"))
    assert not (tmp_path / "a.gif").exists()
