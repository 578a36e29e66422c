"""Prompts of VBench: how many videos, under which names, and what cannot be a name."""

import json
from pathlib import Path

import pytest

from fewstep.evaluation.vbench.constants import DIMENSIONS
from fewstep.evaluation.vbench.suite import Suite, parse_dimensions, read_extended, require_name
from tests.evaluation.vbench.suite_files import ENTRIES, write_suite


def test_counts_and_places(tmp_path: Path) -> None:
    suite = Suite.read(write_suite(tmp_path))
    assert suite.prompts == ("In a still frame, a stop sign", "a dog", "a cat playing in park", "a still vase")
    assert suite.dimensions["a dog"] == ("object_class", "overall_consistency")
    everything = suite.videos(list(DIMENSIONS))
    assert len(everything) == 2 * 25 + 2 * 5
    assert len({video.index for video in everything}) == 60
    assert len({video.name for video in everything}) == 60
    # A video's place in the store does not depend on what else is asked for.
    of_dog = suite.videos(["object_class"], count=2)
    assert [(video.name, video.index) for video in of_dog] == [("a dog-0.mp4", 25), ("a dog-1.mp4", 26)]
    assert set(of_dog) < set(everything)
    assert len(suite.videos(["temporal_flickering"], flickering=3)) == 6
    assert suite.of_dimension("dynamic_degree") == ["a cat playing in park"]
    for count in ({"count": 0}, {"count": 6}, {"flickering": 26}):
        with pytest.raises(ValueError, match="VBench takes 1 to 5, and 1 to 25"):
            suite.videos(["object_class"], **count)


def test_the_file_is_found_in_every_layout(tmp_path: Path) -> None:
    root = write_suite(tmp_path / "checkout")
    for place in (root, root / "vbench", root / "vbench" / "VBench_full_info.json"):
        assert len(Suite.read(place).prompts) == 4
    with pytest.raises(ValueError, match=r"has no VBench_full_info\.json: give a checkout"):
        Suite.read(tmp_path)


@pytest.mark.parametrize("prompt", ["a/b", "..", ".", "", " ", ".hidden", "a\0b", "x" * 250])
def test_prompts_that_are_no_names_are_refused(tmp_path: Path, prompt: str) -> None:
    (tmp_path / "VBench_full_info.json").write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]}]))
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        Suite.read(tmp_path)
    require_name("x" * 240)


@pytest.mark.parametrize(
    "content", ["{}", "[1]", '[{"prompt_en": "a"}]', "{", '[{"prompt_en": "a", "dimension": ["x"]}]']
)
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "VBench_full_info.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"VBench_full_info.json (is no list of prompt_en|has the dimension 'x')|no list"
    ):
        Suite.read(tmp_path)


def test_dimensions_by_name() -> None:
    assert parse_dimensions("all") == list(DIMENSIONS)
    assert parse_dimensions("scene, color") == ["color", "scene"]
    for text in ("", "scen", "scene,x"):
        with pytest.raises(ValueError, match="is unknown; use all, or some of subject_consistency"):
            parse_dimensions(text)


def test_extended_prompts_keep_their_original(tmp_path: Path) -> None:
    prompts = ["a", "b"]
    assert read_extended(None, prompts) == {"a": "a", "b": "b"}
    (tmp_path / "lines.txt").write_text("a long\nb long\n")
    assert read_extended(tmp_path / "lines.txt", prompts) == {"a": "a long", "b": "b long"}
    records = [{"prompt": "b", "extended": "B"}, {"prompt": "a", "extended": "A"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert read_extended(tmp_path / "pairs.jsonl", prompts) == {"a": "A", "b": "B"}
    (tmp_path / "few.txt").write_text("a long\n")
    (tmp_path / "few.jsonl").write_text(json.dumps(records[0]))
    (tmp_path / "bad.jsonl").write_text("{}")
    for name, message in (
        ("few.txt", "has 1 lines for 2 prompts"),
        ("few.jsonl", "has no extended text for 1 prompts, the first is 'a'"),
        ("bad.jsonl", "needs lines of JSON"),
        ("none.txt", "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_extended(tmp_path / name, prompts)
    assert len(ENTRIES) == 5
