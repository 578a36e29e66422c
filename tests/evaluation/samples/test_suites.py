"""Folders of other benchmarks' judges: names, counts and contents, and prompts that cannot be read."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.commands.draw_suite import draw_suite
from fewstep.evaluation.samples.store import SamplePlan, SampleStore, prompts_digest
from fewstep.evaluation.samples.suites import SUITES, PictureSuite, read_suite, write_suite
from tests.tiny_pipelines import build_sd3, save_pipeline

RECORDS = [{"tag": "colors", "include": [], "prompt": "a red cat"}, {"tag": "two", "prompt": "a dog"}]


def filled(suite: PictureSuite, folder: Path) -> SampleStore:
    """A store whose sample i is grey i."""
    store = SampleStore(folder, SamplePlan("x", "m", {}, "float32", 0, prompts_digest(suite.asked)))
    for index, prompt in enumerate(suite.asked):
        store.add(index, prompt, torch.full((3, 2, 2), index / 255.0))
    return store


def grey(path: Path) -> int:
    return int(np.asarray(Image.open(path))[0, 0, 0])


def test_geneval(tmp_path: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    suite = read_suite("geneval", file)
    assert suite.asked == ("a red cat",) * 4 + ("a dog",) * 4
    out = write_suite(suite, filled(suite, tmp_path / "store"), tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001"]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == RECORDS[1]
    assert [grey(out / "00001" / "samples" / f"{number:04d}.png") for number in range(4)] == [4, 5, 6, 7]


def test_dpg_bench(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, text in (("10.txt", "ten\nlines"), ("9.txt", "nine")):
        (tmp_path / "prompts" / name).write_text(text)
    suite = read_suite("dpg", tmp_path / "prompts")
    assert suite.prompts == ("nine", "ten lines")
    out = write_suite(suite, filled(suite, tmp_path / "store"), tmp_path / "out")
    picture = np.asarray(Image.open(out / "10.png"))
    assert picture.shape == (4, 4, 3)
    assert picture[::2, ::2, 0].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="count is 2; use at least 1, and for dpg the 4 pictures"):
        read_suite("dpg", tmp_path / "prompts", count=2)


def test_compbench(tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a blue bench\n\na green car\n")
    suite = read_suite("t2i_compbench", tmp_path / "color_val.txt", count=2)
    out = write_suite(suite, filled(suite, tmp_path / "store"), tmp_path / "out")
    names = sorted(path.name for path in (out / "samples").iterdir())
    assert names == [
        "a blue bench_000000.png",
        "a blue bench_000001.png",
        "a green car_000002.png",
        "a green car_000003.png",
    ]
    assert [grey(out / "samples" / name) for name in names] == [0, 1, 2, 3]
    assert read_suite("t2i_compbench", tmp_path / "color_val.txt").count == 10


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("geneval", '{"tag": 1}', "line 1 is no metadata of GenEval"),
        ("geneval", "", "holds no prompts of geneval"),
        ("dpg", "x", "is no folder; DPG-Bench has a .txt file"),
        ("t2i_compbench", "a/b", "cannot be the name of a file"),
        ("t2i_compbench", "x" * 260, "cannot be the name of a file"),
        ("drawbench", "x", "suite 'drawbench' is unknown; known are geneval, dpg, t2i_compbench"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, kind: str, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_suite(kind, tmp_path / "file")
    with pytest.raises(ValueError, match=r"there is no .* with the prompts of geneval"):
        read_suite("geneval", tmp_path / "nowhere")
    assert len(SUITES) == 3


@pytest.mark.slow
def test_the_command_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_pipeline(build_sd3(), tmp_path / "tiny")
    (tmp_path / "list.txt").write_text("a cat\na dog\n")
    arguments = [
        "t2i_compbench",
        "--pipeline",
        folder,
        "--prompts",
        tmp_path / "list.txt",
        "--output",
        tmp_path / "out",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["draw_suite.py", *map(str, arguments), "--steps", "1", "--guidance", "1", "--count", "3"]
        )
        draw_suite()
    assert capsys.readouterr().out.startswith("6 pictures of 2 prompts for t2i_compbench")
    assert len(list((tmp_path / "out" / "t2i_compbench" / "samples").iterdir())) == 6
