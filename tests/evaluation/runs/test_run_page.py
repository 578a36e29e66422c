"""Run directories as pages: what is read, what differs, and what is on the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fewstep.core.training.best import save_best
from fewstep.core.training.sample_grid import save_grid
from fewstep.evaluation.provenance import Provenance
from fewstep.evaluation.runs.page import HEALTHY, run_content, shown_metrics, write_run_page
from fewstep.evaluation.runs.read import differing_settings, flat, read_run

MADE = Provenance("python scripts/report_runs.py --run a", "2026-01-02", "3.11", (("torch", "2.11"),), "a CPU", 2)


def write_run(folder: Path, *, rate: float, losses: Sequence[float | str], tail: str = "") -> Path:
    """A run directory with settings, a record per step, a health message and two grids."""
    folder.mkdir(parents=True)
    settings: Mapping[str, Any] = {
        "run": {"directory": str(folder), "steps": 100, "seed": 0},
        "student": {"optimizer": {"learning_rate": rate}, "times": [1.0, 0.5]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    records: list[dict[str, Any]] = [
        {"step": 10 * number, "student_loss": loss, "unknown": number, "seconds_per_step": 0.25}
        for number, loss in enumerate(losses, start=1)
    ]
    records.insert(1, {"step": 10, "note": "health: samples flatten"})
    records.insert(1, {"step": 10, "note": "a note of another kind"})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records) + tail, encoding="utf-8")
    for step in (0, 5, 10):
        save_grid(torch.rand(3, 3, 8, 8), folder / "samples" / f"step-{step:07d}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "one", rate=1e-3, losses=[3.0, 2.0, "nan"])


def test_a_run_is_read_as_it_is(run: Path) -> None:
    save_best(run, 20, {"w": torch.ones(2)}, figure="kid", value=0.25)
    found = read_run(run)
    assert (found.name, found.step, found.best) == ("one", 30, (20, "kid", 0.25))
    assert found.last_checkpoint is None
    assert [step for step, _ in found.grids] == [0, 10]
    assert [(one.step, one.text) for one in found.health] == [(10, "samples flatten")]
    assert found.settings["student.optimizer.learning_rate"] == 1e-3
    assert found.settings["student.times"] == [1.0, 0.5]
    assert found.last("seconds_per_step") == 0.25
    assert found.last("nothing") is None


def test_a_run_in_the_middle_of_a_line_is_read(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "going", rate=1.0, losses=[1.0, 2.0], tail='{"step": 99, "stud'))
    assert found.step == 20
    assert len(found.health) == 1


def test_settings_that_differ_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "two", rate=2e-3, losses=[1.0])
    content = yaml.safe_load((other / "config.yaml").read_text(encoding="utf-8"))
    (other / "config.yaml").write_text(yaml.safe_dump({**content, "gan": {"weight": 0.5}}), encoding="utf-8")
    rows = differing_settings([read_run(run), read_run(other)])
    # Where they are written is no difference.
    assert rows == [
        ("student.optimizer.learning_rate", ("0.001", "0.002")),
        ("gan.weight", ("-", "0.5")),
    ]
    assert flat({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_the_page_holds_all_of_it(run: Path, tmp_path: Path) -> None:
    save_best(run, 20, {"w": torch.ones(2)}, figure="kid", value=0.25)
    other = read_run(write_run(tmp_path / "two", rate=2e-3, losses=[1.0, 0.5]), name="<second>")
    page = write_run_page(tmp_path / "report", [read_run(run), other], MADE)
    text = page.read_text(encoding="utf-8")
    assert "one: step 30 of 100, 0.25 s a step; best kid 0.25 at step 20; 1 health message" in text
    assert text.count("data:image/png;base64,") == 1 + 4
    assert "one, step 10: samples flatten" in text
    assert "&lt;second&gt;" in text
    assert "<second>" not in text
    assert str(tmp_path) not in text
    assert HEALTHY["student_loss"] in text
    assert "http" not in text.replace("http-equiv", "")
    data = json.loads((tmp_path / "report" / "runs.json").read_text(encoding="utf-8"))
    assert data["runs"]["one"]["last"]["student_loss"] == "nan"
    assert data["differences"] == {"student.optimizer.learning_rate": ["0.001", "0.002"]}


def test_metrics_with_a_meaning_come_first(run: Path) -> None:
    shown, left_out = shown_metrics([read_run(run)])
    assert shown == ["student_loss", "seconds_per_step", "unknown"]
    assert left_out == []
    content = run_content([read_run(run)], MADE)
    assert [row[0] for row in content.healthy.rows] == ["student_loss", "seconds_per_step"]
    assert content.differences is None
    assert content.title == "one"


def test_what_is_no_run_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.yaml and metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="each a name of its own: NAME=DIR"):
        run_content([read_run(run), read_run(run)], MADE)
    (run / "config.yaml").write_text("- a list\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no settings"):
        read_run(run)


def test_what_lies_about_stops_no_page(run: Path, tmp_path: Path) -> None:
    """Stray and broken pictures, blank lines, huge numbers and damaged best weights."""
    grids = run / "samples"
    (grids / "step-0000000.png").write_bytes(b"")
    (grids / "step-0000005 (copy).png").write_bytes(b"x")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"step": 40, "student_loss": 1e308}\n{"step": 50, "student_loss": -1e308}\n')
    kept = save_best(run, 20, {"w": torch.ones(2)}, figure="kid", value=0.25)
    with (kept / "student_ema.safetensors").open("ab") as file:
        file.write(b"0")
    found = read_run(run)
    assert [step for step, _ in found.grids] == [5, 10]
    assert (found.best, found.damaged, found.step) == (None, True, 50)
    page = write_run_page(tmp_path / "report", [found], MADE)
    assert "best weights cannot be read" in page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml is a file; name a folder"):
        write_run_page(run / "config.yaml", [found], MADE)
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"config\.yaml holds no settings"):
        read_run(run)
