"""Stores of samples: whole files alone count, several processes share one, and a store does not change its mind."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fewstep.evaluation.samples.draw import fill, missing_blocks
from fewstep.evaluation.samples.store import MANIFEST, SamplePlan, SampleStore, prompts_digest
from tests.core.media.test_videos import read_whole_video

PROMPTS = ("a", "b", "c")
PLAN = SamplePlan("tiny", "mark", {"steps": 2, "guidance": 1.0}, "float32", 0, prompts_digest(PROMPTS))


class Killed(Exception):
    """Stands for the end of a process."""


def draw(texts: object, indices: object) -> Tensor:
    """A picture per index, of one grey."""
    return torch.stack([torch.full((3, 4, 4), int(index) / 255.0) for index in indices])  # pyright: ignore[reportGeneralTypeIssues]


def greys(store: SampleStore, count: int) -> list[int]:
    samples = store.require(count)
    return [int(np.asarray(Image.open(store.folder / one.file))[0, 0, 0]) for one in samples]


def test_samples_are_those_of_their_index(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s", PLAN)
    assert fill(store, draw, PROMPTS, 10, batch_size=4) == 10
    assert greys(store, 10) == list(range(10))
    assert [one.prompt for one in store.require(5)] == ["a", "b", "c", "a", "b"]
    assert store.path(1234) == tmp_path / "s" / "0001" / "001234.png"
    store.merge()
    lines = (tmp_path / "s" / MANIFEST).read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(10))
    assert not list((tmp_path / "s").glob("manifest.*.jsonl"))
    # It grows, and nothing is made twice.
    assert fill(SampleStore.open(tmp_path / "s"), draw, PROMPTS, 13, batch_size=4) == 3
    assert greys(store, 13) == list(range(13))


@given(
    count=st.integers(1, 23),
    batch_size=st.integers(1, 7),
    world=st.integers(1, 4),
    deaths=st.lists(st.integers(0, 9), max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_any_number_of_processes_that_die_at_any_time_make_each_sample_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch_size: int, world: int, deaths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store") / "s"
    made: list[int] = []

    def dying(life: int):
        def one(texts: object, indices: object) -> Tensor:
            nonlocal life
            life -= 1
            if life < 0:
                raise Killed
            return draw(texts, indices)

        return one

    for number, life in enumerate(deaths):
        store = SampleStore(folder, PLAN)
        with contextlib.suppress(Killed):
            made.append(
                fill(store, dying(life), PROMPTS, count, batch_size=batch_size, rank=number % world, world_size=world)
            )
    before = len(SampleStore(folder, PLAN).samples())
    rest = [
        fill(SampleStore(folder, PLAN), draw, PROMPTS, count, batch_size=batch_size, rank=rank, world_size=world)
        for rank in range(world)
    ]
    # Ranks divide the blocks that are missing when they start: here one after the other, so some blocks wait.
    rest.append(fill(SampleStore(folder, PLAN), draw, PROMPTS, count, batch_size=batch_size))
    assert before + sum(rest) == count
    assert greys(SampleStore(folder, PLAN), count) == list(range(count))
    assert missing_blocks(SampleStore(folder, PLAN), count, batch_size=batch_size) == []


def test_a_line_that_was_cut_is_no_sample(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s", PLAN)
    fill(store, draw, PROMPTS, 3, batch_size=1)
    manifest = tmp_path / "s" / "manifest.0.jsonl"
    manifest.write_text(manifest.read_text()[:-20])
    assert sorted(store.samples()) == [0, 1]
    with pytest.raises(ValueError, match=r"lacks 1 of 3 samples \(the first is 2\)"):
        store.require(3)
    assert fill(store, draw, PROMPTS, 3, batch_size=1) == 1
    assert greys(store, 3) == [0, 1, 2]
    store.path(1).unlink()
    assert sorted(store.samples()) == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed = 0, and 1 is asked for"),
        ({"call": {"steps": 4, "guidance": 1.0}}, r"call = \{'steps': 2"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', and 'bfloat16'"),
        ({"fingerprint": "other"}, "fingerprint = 'mark'"),
    ],
)
def test_another_plan_is_another_store(tmp_path: Path, change: dict[str, object], message: str) -> None:
    SampleStore(tmp_path / "s", PLAN)
    with pytest.raises(ValueError, match=message):
        SampleStore(tmp_path / "s", dataclasses.replace(PLAN, **change))  # pyright: ignore[reportArgumentType]


def test_folders_of_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds other files and no store\.json"):
        SampleStore(tmp_path, PLAN)
    with pytest.raises(ValueError, match="is no store of samples"):
        SampleStore.open(tmp_path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        missing_blocks(SampleStore(tmp_path / "s", PLAN), 3, batch_size=0)


def test_broken_pixels_are_no_sample(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s", PLAN)
    with pytest.raises(ValueError, match="pixels that are not finite"):
        store.add(0, "a", torch.full((3, 4, 4), torch.nan))
    assert store.samples() == {}


def test_videos_are_films(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, kind="videos", rate=8)
    store = SampleStore(tmp_path / "s", plan)
    clip = torch.linspace(0.2, 0.8, 5).view(1, 5, 1, 1).expand(3, 5, 16, 16)
    store.add(7, "a", clip)
    assert store.path(7).name == "000007.mp4"
    assert (read_whole_video(store.path(7)) - clip).abs().max() < 0.03


def test_files_that_were_changed_are_seen(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "s", PLAN)
    fill(store, draw, PROMPTS, 3, batch_size=1)
    whole = store.path(1).read_bytes()
    store.path(1).write_bytes(whole[:-4])
    assert sorted(store.samples()) == [0, 2]
    store.path(1).write_bytes(whole[:-1] + b"x")
    samples = store.require(3)
    with pytest.raises(ValueError, match=r"000001\.png was changed after it was drawn; delete it"):
        store.require_unchanged(samples)
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store\.json says no longer what the samples"):
        SampleStore.open(tmp_path / "s")
