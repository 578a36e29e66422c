"""Totals: VBench's own arithmetic, published triples, intervals, and no total while something is missing."""

import json
import random
import zipfile
from pathlib import Path

import pytest

from fewstep.evaluation.vbench.aggregate import (
    Scored,
    group_score,
    normalised,
    protocol_line,
    read_results,
    total_score,
    totals,
    write_submission,
)
from fewstep.evaluation.vbench.constants import COMMIT, DIMENSIONS
from fewstep.evaluation.vbench.page import TOTALS, totals_table, write_totals


def write_result(folder: Path, name: str, values: dict[str, list[float]]) -> float:
    """A result file as VBench writes it; returns the raw score."""
    videos = [
        {"video_path": f"/videos/{prompt}-{number}.mp4", "video_results": value}
        for prompt, own in values.items()
        for number, value in enumerate(own)
    ]
    raw = sum(video["video_results"] for video in videos) / len(videos)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results" / f"{name}.json").write_text(json.dumps({name: [raw, videos]}))
    return raw


def write_all(folder: Path, seed: int = 0) -> dict[str, float]:
    generator = random.Random(seed)
    prompts = [f"prompt {number}-{number}" for number in range(30)]
    return {
        name: write_result(
            folder, name, {prompt: [generator.random() * kind.high for _ in range(2)] for prompt in prompts}
        )
        for name, kind in DIMENSIONS.items()
    }


def test_the_total_is_the_weighted_mean_of_normalised_scores(tmp_path: Path) -> None:
    raw = write_all(tmp_path)
    found = totals(read_results(tmp_path))
    # Written out: seven halves of quality, of which dynamic degree counts half, and nine of semantic.
    parts = {
        name: (value - DIMENSIONS[name].low) / (DIMENSIONS[name].high - DIMENSIONS[name].low)
        for name, value in raw.items()
    }
    quality = [parts[name] for name, kind in DIMENSIONS.items() if kind.quality and name != "dynamic_degree"]
    semantic = [parts[name] for name, kind in DIMENSIONS.items() if not kind.quality]
    assert (len(quality), len(semantic)) == (6, 9)
    expected = ((sum(quality) + 0.5 * parts["dynamic_degree"]) / 6.5, sum(semantic) / 9)
    assert found.quality == pytest.approx(expected[0], abs=1e-12)
    assert found.semantic == pytest.approx(expected[1], abs=1e-12)
    assert found.total == pytest.approx((4 * expected[0] + expected[1]) / 5, abs=1e-12)
    assert found.missing == ()
    total = found.intervals["total"]
    assert found.total is not None
    assert total.low < found.total < total.high
    assert total.high - total.low < 0.15


@pytest.mark.parametrize(
    ("quality", "semantic", "total"),
    [(85.69, 79.92, 84.53), (85.86, 80.15, 84.72), (85.31, 80.14, 84.27), (84.59, 80.64, 83.80), (84.84, 81.32, 84.13)],
)
def test_published_halves_give_their_published_totals(quality: float, semantic: float, total: float) -> None:
    """Of the tables of FastGen and Reward-Forcing."""
    assert total_score(quality, semantic) == pytest.approx(total, abs=0.02)


def test_constants_are_those_of_the_final_score_script() -> None:
    assert normalised("subject_consistency", 0.1462) == 0.0
    assert normalised("motion_smoothness", 0.9975) == pytest.approx(1.0)
    assert normalised("scene", 0.4111) == pytest.approx(0.5)
    assert normalised("temporal_flickering", 0.0) < -1.6
    assert sum(kind.weight for kind in DIMENSIONS.values() if kind.quality) == 6.5
    assert len(COMMIT) == 40


def test_a_missing_dimension_leaves_no_total(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "results" / "scene.json").unlink()
    scores = read_results(tmp_path)
    found = totals(scores)
    assert found.quality is not None
    assert (found.semantic, found.total, found.missing) == (None, None, ("scene",))
    assert group_score({}, quality=True) is None
    with pytest.raises(ValueError, match="a submission needs all dimensions; missing are scene"):
        write_submission(tmp_path)
    table = totals_table(scores, found)
    assert [row[2] for row in table.rows[-3:]] == [f"{100 * found.quality:.2f}", "-", "-"]
    content = json.loads(write_totals(tmp_path, scores, found).read_text())
    assert (content["total"], content["missing"]) == (None, ["scene"])
    assert (tmp_path / TOTALS).is_file()


def test_a_submission_holds_all_results(tmp_path: Path) -> None:
    raw = write_all(tmp_path)
    with zipfile.ZipFile(write_submission(tmp_path)) as archive:
        names = sorted(archive.namelist())
        assert names == sorted(f"{name}.json" for name in DIMENSIONS)
        assert json.loads(archive.read("scene.json"))["scene"][0] == raw["scene"]


def test_intervals_draw_prompts_with_all_their_videos(tmp_path: Path) -> None:
    """Five equal videos of each of ten prompts say no more than ten videos."""
    generator = random.Random(1)
    values = [generator.random() for _ in range(10)]
    for name, copies in (("object_class", 5), ("human_action", 1)):
        write_result(tmp_path, name, {f"p{number}": [value] * copies for number, value in enumerate(values)})
    widths = {name: one.high - one.low for name, one in totals(read_results(tmp_path)).intervals.items()}
    assert widths["object_class"] == pytest.approx(widths["human_action"], rel=0.15)


def test_results_that_do_not_average_have_no_interval(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    videos = [
        {"video_path": "/a-0.mp4", "video_results": {"cor_num": 3}},
        {"video_path": "/b-0.mp4", "video_results": {}},
    ]
    (tmp_path / "results" / "color.json").write_text(json.dumps({"color": [0.7, videos]}))
    scores = read_results(tmp_path)
    assert scores["color"] == Scored(0.7, ("a", "b"), None)
    assert totals(scores).intervals == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no result of VBench"),
        ("{", "no result of VBench"),
        ('{"sharp": [1, []]}', "the dimension 'sharp' is unknown"),
    ],
)
def test_other_files_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path)


def test_no_results_are_an_error_and_the_protocol_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no results; score the videos first"):
        read_results(tmp_path)
    assert "how the videos were scored is not recorded" in protocol_line(tmp_path)
    known = {"suite": "VBench", "videos_per_prompt": 5, "static_filter": True, "partial": True, "processes": 1}
    (tmp_path / "protocol.json").write_text(json.dumps({**known, "device": "cuda", "weights": {"a": "b"}}))
    assert protocol_line(tmp_path) == (
        "VBench, constants of 45e79ec, 5 videos a prompt, static filter, SOME VIDEOS MISSING, 1 process, cuda, "
        "1 weights by digest"
    )
