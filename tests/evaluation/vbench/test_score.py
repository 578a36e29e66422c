"""Scoring through another interpreter, here this one with a package vbench of a few lines in front."""

import hashlib
import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.core.media.videos import iterate_frames, write_film
from fewstep.evaluation.vbench import constants
from fewstep.evaluation.vbench.aggregate import read_results
from fewstep.evaluation.vbench.score import Scoring, score_suite
from fewstep.evaluation.vbench.suite import Suite
from fewstep.evaluation.video.curves import video_curves
from tests.evaluation.vbench.suite_files import write_suite

DIMENSIONS = ["temporal_flickering", "object_class", "overall_consistency"]
# The parts of VBench's package that the worker calls, in VBench's own forms.
STUB = {
    "utils.py": "CACHE_DIR = '.'\n"
    "def init_submodules(names, local=False, read_frame=False):\n    return {n: [n] for n in names}\n",
    "object_class.py": "import json\ndef compute_object_class(info, device, submodules):\n"
    "    entries = json.load(open(info))\n    assert submodules == ['object_class']\n"
    "    rows = [{'video_path': p, 'video_results': len(e['auxiliary_info']) / 4}"
    " for e in entries for p in e['video_list']]\n"
    "    return sum(r['video_results'] for r in rows) / len(rows), rows\n",
    "temporal_flickering.py": "import json\ndef compute_temporal_flickering(info, device, submodules):\n"
    "    rows = [{'video_path': p, 'video_results': 0.5} for e in json.load(open(info)) for p in e['video_list']]\n"
    "    return 0.5, rows\n",
    "overall_consistency.py": "import subprocess\ndef compute_overall_consistency(info, device, submodules):\n"
    "    subprocess.run(['wget', 'http://somewhere'], check=True)\n",
    "cli/__init__.py": "",
    "cli/static_filter.py": "class StaticFilter:\n    def __init__(self, args, device):\n        pass\n"
    "    def infer(self, path):\n        return int(path.rsplit('-', 1)[1].split('.')[0]) % 3 != 0\n",
    "__init__.py": "",
}


@pytest.fixture
def scoring(tmp_path: Path) -> Scoring:
    """A root, videos of all its prompts, weights of the right names, and an interpreter that finds the stub."""
    package = tmp_path / "stub" / "vbench"
    for name, text in STUB.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "stub"} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    cache, videos = tmp_path / "cache", tmp_path / "videos"
    for dimension in (*DIMENSIONS, "dynamic_degree"):
        for name in constants.DIMENSIONS[dimension].weights:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_bytes(name.encode())
    videos.mkdir()
    suite = Suite.read(write_suite(tmp_path / "root"))
    for video in suite.videos(DIMENSIONS):
        (videos / video.name).write_bytes(b"film")
    return Scoring(videos, tmp_path / "scores", str(python), str(tmp_path / "root"), cache, device="cpu")


def test_each_dimension_is_a_process_and_a_file(scoring: Scoring) -> None:
    suite = Suite.read(scoring.root)
    with pytest.raises(RuntimeError, match=r"(?s)others are kept:\n  overall_consistency: .*VBench wants to fetch"):
        score_suite(scoring, suite, DIMENSIONS)
    found = read_results(scoring.output)
    assert (found["object_class"].raw, found["temporal_flickering"].raw) == (0.25, 0.5)
    assert len(found["object_class"].prompts) == 5
    # The filter takes two of three, the first five are judged, and the counts stay.
    assert len(found["temporal_flickering"].prompts) == 10
    info = json.loads((scoring.output / "info" / "temporal_flickering.json").read_text())
    assert [Path(path).name[-5:-4] for path in info[0]["video_list"]] == ["1", "2", "4", "5", "7"]
    static = json.loads((scoring.output / "static_filter.json").read_text())
    assert (len(static), sum(static.values())) == (50, 32)
    protocol = json.loads((scoring.output / "protocol.json").read_text())
    assert (protocol["processes"], protocol["static_filter"], protocol["partial"]) == (1, True, False)
    digest = protocol["weights"]["grit_model/grit_b_densecap_objectdet.pth"]
    assert digest == hashlib.sha256(b"grit_model/grit_b_densecap_objectdet.pth").hexdigest()
    # What is scored is not scored again.
    before = os.stat(scoring.output / "results" / "object_class.json").st_mtime_ns
    score_suite(scoring, suite, ["object_class"])
    assert os.stat(scoring.output / "results" / "object_class.json").st_mtime_ns == before


def test_everything_that_is_missing_is_listed_before_anything_starts(scoring: Scoring) -> None:
    suite = Suite.read(scoring.root)
    (scoring.videos / "a dog-3.mp4").unlink()
    (scoring.videos / "a still vase-24.mp4").write_bytes(b"")
    (scoring.cache / "grit_model" / "grit_b_densecap_objectdet.pth").unlink()
    (scoring.cache / constants.FILTER_WEIGHTS).unlink()
    (scoring.cache / "clip_model").mkdir()
    (scoring.cache / "clip_model" / "ViT-B-32.pt").write_bytes(b"other")
    with pytest.raises(ValueError, match="nothing was scored; missing are:") as caught:
        score_suite(scoring, suite, [*DIMENSIONS, "appearance_style"])
    text = str(caught.value)
    for part in (
        "2 of 55 videos",
        "the first is 'a dog-3.mp4'",
        "weights " + str(scoring.cache / "grit_model"),
        "raft-things.pth",
        "ViT-B-32.pt is another file: its SHA-256 is",
        "appearance_style in",
    ):
        assert text.count(part) == 1, part
    assert not (scoring.output / "results").exists()
    with pytest.raises(ValueError, match="make vbench-env makes one"):
        score_suite(replace(scoring, python="/nowhere/python"), suite, ["object_class"])


def test_some_videos_are_scored_only_when_asked(scoring: Scoring) -> None:
    suite = Suite.read(scoring.root)
    (scoring.videos / "a dog-3.mp4").unlink()
    score_suite(replace(scoring, partial=True), suite, ["object_class"])
    assert len(read_results(scoring.output)["object_class"].prompts) == 4
    assert json.loads((scoring.output / "protocol.json").read_text())["partial"] is True


def test_without_the_filter_the_first_five_are_judged(scoring: Scoring) -> None:
    score_suite(replace(scoring, filtered=False), Suite.read(scoring.root), ["temporal_flickering"])
    info = json.loads((scoring.output / "info" / "temporal_flickering.json").read_text())
    assert [Path(path).name[-5:-4] for path in info[0]["video_list"]] == list("01234")


def test_flickering_is_vbenchs_closed_form(tmp_path: Path) -> None:
    """Frames of two greys in turn: (255 - their difference) / 255, up to the codec."""
    frames = [np.full((32, 32, 3), 100 + 20 * (number % 2), np.uint8) for number in range(8)]
    film = write_film(frames, tmp_path / "a.mp4", rate=8, quality=1)
    assert video_curves(iterate_frames(film)).flickering() == pytest.approx((255 - 20) / 255, abs=0.01)
