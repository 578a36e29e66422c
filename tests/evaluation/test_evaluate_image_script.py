"""The command line in its own process: help is quick, bad input fails with a sentence, a run writes a report."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

SCRIPT = Path("scripts") / "evaluate_image.py"


def run(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=120)


def test_help_is_quick(repository) -> None:
    started = time.monotonic()
    done = run(repository, "--help")
    assert time.monotonic() - started < 2.0
    assert done.returncode == 0
    assert done.stdout.count("--pipeline") >= 1


@pytest.mark.slow
def test_report_of_two_systems(
    repository, pipeline_folder, export_folder, classifier_folder, tmp_path, monkeypatch, capsys
) -> None:
    card = (export_folder / "distillation.json").read_bytes()
    arguments = [
        *("--pipeline", f"teacher={pipeline_folder}", "--pipeline", f"teacher={pipeline_folder}"),
        *("--pipeline", f"student={export_folder}", "--steps", "3", "2", "2", "--guidance", "2", "1", "1"),
        *("--grid", "own", "1,0.5", "own", "--samples", "20", "--seed", "0", "1", "--reference", "digits"),
        *("--classifier", str(classifier_folder), "--output", str(tmp_path / "report"), "--repetitions", "10"),
        *(
            "--timing_repeats",
            "1",
            "--threads",
            "1",
            "--scorer",
            f"digit_log_probability={classifier_folder}",
            "--baseline",
            "1",
        ),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate_image.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(repository / SCRIPT), run_name="__main__")
    assert stopped.value.code is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (lines[0], *lines[2:6])] == ["system", "real", "teacher", "teacher,", "student"]
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(row["name"], row["steps"], row["call"], len(row["results"])) for row in content["rows"]] == [
        ("teacher", 3, "", 2),
        ("teacher", 2, "sigmas 1,0.5", 2),
        ("student", 2, "", 2),
    ]
    assert content["baseline"] == "teacher, 2 steps, sigmas 1,0.5"
    assert [one["key"] for one in content["measures"]] == [
        "fid",
        "kid",
        "accuracy",
        "diversity",
        "digit_log_probability",
    ]
    assert content["rows"][2]["minus_baseline"]["digit_log_probability"]["low"] < 9.0
    assert content["rows"][0]["latency"]["threads"] == 1
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    # An evaluation writes into what it judges only when it is asked to.
    assert (export_folder / "distillation.json").read_bytes() == card


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(repository, pipeline_folder, classifier_folder, tmp_path) -> None:
    """The same pictures to the byte, and the same figures."""
    common = [
        *(
            "--pipeline",
            str(pipeline_folder),
            "--steps",
            "1",
            "--guidance",
            "1",
            "--samples",
            "40",
            "--batch_size",
            "8",
        ),
        *("--reference", "digits", "--classifier", str(classifier_folder), "--timing_repeats", "0"),
    ]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    found = []
    for start in ([], launch):
        output = tmp_path / f"out{len(found)}"
        command = [sys.executable, *start, str(SCRIPT), *common, "--output", str(output)]
        # Another number of threads adds in another order.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=repository, capture_output=True, text=True, check=False, timeout=170, env=alone
        )
        assert done.returncode == 0, done.stderr[-2000:]
        (store,) = [path for path in (output / "samples").iterdir() if "_grid" not in path.name]
        digests = {
            one["file"]: one["sha256"] for one in map(json.loads, (store / "manifest.jsonl").read_text().splitlines())
        }
        figures = json.loads((output / "report.json").read_text())["rows"][0]["results"][0]["figures"]
        found.append((digests, figures))
    assert len(found[0][0]) == 40
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pipeline", "nowhere"), "there is no directory nowhere"),
        (("--pipeline", "docs"), "no diffusers pipeline"),
        (("--pipeline", "docs", "--samples", "0"), "samples is 0"),
        ((), "nothing to judge: give --pipeline DIR, or --pictures DIR"),
        (("--pictures", "nowhere"), "there is no directory nowhere"),
        (("--pictures", "assets"), "nothing to measure: give --metrics, --scorer, or real pictures: --reference"),
        (("--pictures", "assets", "--reference", "digits:valid"), "the digits have digits:test and digits:train"),
        (("--pictures", "assets", "--reference", "digits", "--metrics", "fid,sharp"), "metric 'sharp' is unknown"),
        (("--pictures", "assets", "--reference", "digits", "--weights", "x"), "--weights is NAME=PATH"),
        (("--pictures", "assets", "--reference", "digits", "--weights", "x=y"), "--weights names 'x'"),
        (("--pictures", "assets", "--reference", "digits", "--scorer", "sharp"), "scorer is 'sharp'; use one of"),
        (("--pictures", "assets", "--reference", "digits", "--scorer", "{name: 3}"), "has no name"),
        (("--pictures", "assets", "--pictures", "x=assets"), "real pictures: --reference digits, or DIR"),
        (("--pictures", "assets", "--pictures", "assets"), "assets is given twice with the same call"),
        (("--pictures", "tests", "--reference", "digits"), "holds 0 pictures"),
        (("--pictures", "assets", "--reference", "digits", "--seed", "0", "0"), "give different ones from 0 on"),
        (("--pictures", "assets", "--reference", "digits", "--device", "foo"), "--device foo cannot be used"),
        (("--pictures", "assets", "--reference", "digits", "--metrics", "fid,fid"), "a measure is named twice"),
        (("--pipeline", "assets/digits_image", "--steps", "1", "--guidance", "nan"), "and a finite number"),
        (("--pictures", "assets", "--reference", "digits", "--baseline", "1"), "there are 1 systems"),
        (("--pictures", "assets", "--reference", "digits", "--protocol", "own"), "protocol is 'own'"),
        (("--pictures", "assets", "--reference", "assets", "--prompts", "README.md"), "needs --weights inception=PATH"),
    ],
)
def test_bad_input_fails_with_a_sentence(repository, tmp_path, capsys, arguments, message) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repository)
        patch.setattr(sys, "argv", ["evaluate_image.py", *arguments, "--output", str(tmp_path / "report")])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(repository / SCRIPT), run_name="__main__")
    text = str(stopped.value.code)
    assert text.startswith("error: ")
    assert text.count(message) == 1
    assert not (tmp_path / "report").exists()


def test_errors_leave_the_process_with_a_sentence(repository, tmp_path) -> None:
    done = run(repository, "--pipeline", "nowhere", "--output", tmp_path / "report")
    assert done.returncode == 1
    assert done.stderr.count("there is no directory nowhere") == 1
    assert done.stderr.count("Traceback") == 0


@pytest.mark.slow
def test_folders_of_pictures_need_no_prompts(repository, tmp_path, monkeypatch, capsys) -> None:
    """Distances read no prompts; scorers do, and say so before anything is measured."""
    generator = np.random.default_rng(0)
    for name, count in (("real", 24), ("one", 22), ("two", 22)):
        (tmp_path / name).mkdir()
        for number in range(count):
            pixels = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, image_size=28, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    arguments = [
        *("--pictures", str(tmp_path / "one"), "--pictures", str(tmp_path / "two")),
        *("--reference", str(tmp_path / "real"), "--metrics", "fd_dinov2", "--output", str(tmp_path / "report")),
        *("--weights", f"dinov2={tmp_path / 'dinov2'}", "--timing_repeats", "0"),
    ]
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))

    def call(*more: str) -> str | int | None:
        monkeypatch.setattr(sys, "argv", ["evaluate_image.py", *arguments, *more])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(repository / SCRIPT), run_name="__main__")
        return stopped.value.code

    assert call() is None
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["name"] for row in content["rows"]] == ["one", "two"]
    figure = content["rows"][0]["results"][0]["figures"]["fd_dinov2"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "The first pictures of each folder." in page
    assert "Same prompts" not in page
    assert "stroke_weight reads prompts: give --prompts FILE" in str(call("--scorer", "stroke_weight"))
    capsys.readouterr()
