"""The command line in its own process: help is quick, bad input fails with a sentence, a run writes a report."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path("scripts") / "evaluate_pipeline.py"


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
    arguments = [
        *("--pipeline", f"teacher={pipeline_folder}", "--pipeline", f"student={export_folder}"),
        *("--steps", "3", "2", "--guidance", "2", "1", "--samples", "20", "--seed", "0", "1"),
        *("--classifier", str(classifier_folder), "--output", str(tmp_path / "report")),
        *("--timing_repeats", "1", "--threads", "1"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate_pipeline.py", *arguments])
    runpy.run_path(str(repository / SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in (lines[0], *lines[2:5])] == ["system", "real", "teacher", "student"]
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [(row["name"], row["steps"], len(row["results"])) for row in content["rows"]] == [
        ("teacher", 3, 2),
        ("student", 2, 2),
    ]
    assert content["rows"][0]["latency"]["threads"] == 1
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pipeline", "nowhere"), "there is no directory nowhere"),
        (("--pipeline", "docs"), "no diffusers pipeline"),
        (("--pipeline", "docs", "--samples", "0"), "samples is 0"),
        (("--pipeline", "docs", "--reference", "valid"), "invalid choice: 'valid'"),
    ],
)
def test_bad_input_fails_with_a_sentence(repository, tmp_path, arguments, message) -> None:
    done = run(repository, *arguments, "--output", tmp_path / "report")
    assert done.returncode in (1, 2)
    assert done.stderr.count(message) == 1
    assert done.stderr.count("Traceback") == 0
    assert not (tmp_path / "report").exists()
