"""Figures of streams, and the record that compares cached chunks with recomputed ones."""

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from studies import streaming_speed as benchmark

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.output import check_video_path, until_told, write_video
from fewstep.causal_video.stream.speed import TimedStream, stream_speed, timed
from fewstep.causal_video.stream.state import ChunkOutput, ChunkSeconds
from fewstep.core.media.videos import iterate_frames
from tests.causal_video.tiny_streams import text_pipeline


def outputs(frames: bool) -> list[ChunkOutput]:
    """Three chunks of two latent frames."""
    pixels = torch.zeros(1, 3, 8, 4, 4) if frames else None
    return [ChunkOutput(i, torch.zeros(1, 4, 2, 2, 2), pixels, ChunkSeconds(0, 0, 0)) for i in range(3)]


def test_speed_is_that_of_the_viewer() -> None:
    speed = stream_speed(outputs(True)[-1], [0.5, 0.7, 1.1])
    assert speed.first_seconds == 0.5
    assert speed.chunk_seconds == pytest.approx(0.3)
    assert speed.frames_per_second == pytest.approx(8 / 0.3)
    assert "first chunk after 500 ms, then 300 ms a chunk of 8 frames: 26.7 frames per second (with VAE" in speed.text()
    assert "(without VAE" in stream_speed(outputs(False)[-1], [0.5, 0.7, 1.1]).text()
    one = stream_speed(outputs(False)[0], [0.5])
    assert math.isnan(one.frames_per_second)
    assert one.text().startswith("first chunk after 500 ms (without VAE")
    with pytest.raises(ValueError, match="no chunks"):
        stream_speed(None, [])
    taken, measured = timed(text_pipeline().stream("a red cat", chunks=3))
    assert [output.chunk for output in taken] == [0, 1, 2]
    assert measured.frames_per_chunk == 8
    assert measured.first_seconds > 0


def tiny_system() -> benchmark.System:
    """Two layers, chunks of one frame, a window of two and a sink of one."""
    system = benchmark.random_system(layers=2, heads=2, head_width=12, side=4)
    settings = CausalSettings(ChunkLayout((1,)), CachePolicy(2, 1, "static"), StepSchedule.steps([2, 1]))
    return benchmark.System("tiny", system.network, system.vae, system.text, system.size, settings)


def test_the_record_compares_equal_videos(tmp_path: Path) -> None:
    record = benchmark.streaming_record(tiny_system(), prefix_chunks=7, repeats=1, memory_chunks=30, speed_chunks=3)
    prefix = record.prefix
    assert prefix.difference < 1e-5
    assert [cost.frames for cost in prefix.costs] == [1, 2, 3, 4, 5, 6, 7]
    assert min(min(c.window, c.whole, c.recomputed) for c in prefix.costs) > 0
    assert [point.chunk for point in record.memory] == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 29]
    # 2 (keys and values) x 2 layers x 1 sink frame and 1 window frame x 4 tokens x 24 numbers x 4 bytes
    assert {point.cache_bytes for point in record.memory[2:]} == {2 * 2 * 2 * 4 * 24 * 4}
    sizes = {size.storage: size for size in record.cache_sizes}
    assert sizes["none"].share == 1
    # A byte a number and a scale of four per head of twelve numbers.
    assert sizes["int8"].share == sizes["fp8"].share == pytest.approx((12 + 4) / 48)
    assert (record.decoded.decodes, record.latents_alone.decodes) == (True, False)
    path = benchmark.write_streaming([record], tmp_path / "streaming.json", command=["benchmark.py", "--x"])
    content = json.loads(path.read_text())
    assert content["provenance"]["command"] == "python benchmark.py --x"
    assert content["systems"][0]["prefix"]["costs"][3]["chunk"] == 3
    with pytest.raises(ValueError, match="5 chunks are too few: the window is full after 3"):
        benchmark.prefix_costs(tiny_system(), chunks=5, repeats=1)


def test_videos_are_written(tmp_path: Path) -> None:
    images = [np.full((4, 6, 3), 40 * i, dtype=np.uint8) for i in range(3)]
    with Image.open(write_video(images, tmp_path / "new" / "a.gif", rate=16, scale=2)) as picture:
        assert (picture.size, picture.n_frames, picture.info["duration"]) == ((12, 8), 3, 60)  # pyright: ignore[reportAttributeAccessIssue]
    for path in ("a.webm", "a"):
        with pytest.raises(ValueError, match=r"must end in \.gif or \.mp4"):
            check_video_path(path)
    for suffix in ("gif", "mp4"):
        with pytest.raises(ValueError, match="needs at least 1 frame"):
            write_video([], tmp_path / f"b.{suffix}", rate=16)
    with pytest.raises(ValueError, match="a scale of at least 1, got 0"):
        write_video(images, tmp_path / "b.gif", rate=16, scale=0)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.gif"]


def test_films_are_written_while_they_come_and_no_chunk_is_kept(tmp_path: Path) -> None:
    """A thousand chunks in the memory of a few: each is gone before the one after the next is made."""
    alive: list[weakref.ref[ChunkOutput]] = []

    def chunks() -> Iterator[ChunkOutput]:
        for number in range(1000):
            pixels = torch.full((1, 3, 4, 8, 8), number / 1000)
            output = ChunkOutput(number, torch.zeros(1, 4, 1, 2, 2), pixels, ChunkSeconds(0, 0, 0))
            alive.append(weakref.ref(output))
            assert sum(reference() is not None for reference in alive[:-2]) == 0
            yield output

    stream = TimedStream(chunks())
    film = write_video(until_told(stream, lambda: False), tmp_path / "a.mp4", rate=16)
    assert sum(1 for _ in iterate_frames(film)) == 4000
    assert len(alive) == stream.chunks == 1000
    assert stream.speed.chunks == 1000


def test_a_stream_that_is_told_to_end_is_a_whole_video(tmp_path: Path) -> None:
    made = []

    def chunks() -> Iterator[ChunkOutput]:
        for output in outputs(True) * 100:
            made.append(output)
            yield output

    film = write_video(until_told(chunks(), lambda: len(made) == 5), tmp_path / "a.mp4", rate=16)
    assert len(made) == 5
    assert sum(1 for _ in iterate_frames(film)) == 5 * 8
