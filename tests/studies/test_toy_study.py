"""The toy's study: what the picture is drawn from, the table, and the files."""

import json
from pathlib import Path

import pytest
import torch
from studies.consistency_toy import ToyErrors, ToyNetwork, ToySettings
from studies.consistency_toy_study import STARTS, TEACHERS, TIMES, ToyRow, run_study, table, trajectories, write_study

from fewstep.evaluation.provenance import collect_provenance

TEACHER = TEACHERS["mixture"]


class ExactMap(ToyNetwork):
    """The teacher's average velocity."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return TEACHER.average_velocity(x.double(), t.double(), r.double())


def test_the_exact_map_gives_flat_lines_and_the_paths() -> None:
    flat = trajectories(ExactMap(2), TEACHER, consistency=True)
    assert flat.path.shape == (len(TIMES), len(STARTS)) == (41, 11)
    # The times pass through fp32.
    torch.testing.assert_close(flat.learnt, flat.path[:1].expand_as(flat.path), rtol=0, atol=2e-6)
    jumps = trajectories(ExactMap(2), TEACHER, consistency=False)
    torch.testing.assert_close(jumps.learnt, jumps.path, rtol=0, atol=2e-6)


def test_table_has_medians_and_spread() -> None:
    rows = [ToyRow("mixture", "dcm", seed, ToyErrors(0.01 * (seed + 1), 0.1), 2.0) for seed in range(3)]
    assert "| mixture | `dcm` | 0.0200 [0.0100, 0.0300] | 0.1000 [0.1000, 0.1000] | 2 |" in table(rows)


def test_study_writes_its_files(tmp_path: Path) -> None:
    settings = ToySettings("dcm", steps=2, pretraining=2, batch=16, width=8)
    rows, drawn = run_study([3], settings, ("dcm",))
    assert [(row.teacher, row.objective, row.seed) for row in rows] == [("gaussian", "dcm", 3), ("mixture", "dcm", 3)]
    made = collect_provenance("scripts/benchmark_toy.py", arguments=["--steps", "2"])
    write_study(rows, drawn, settings=settings, made=made, output=tmp_path)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["settings"] == {
        "steps": 2, "pretraining": 2, "batch": 16, "width": 8, "learning_rate": 3e-3, "grid_steps": 256,
    }  # fmt: skip
    assert record["rows"][1]["errors"]["mean"] == pytest.approx(rows[1].errors.mean)
    assert (tmp_path / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    assert "python scripts/benchmark_toy.py --steps 2" in (tmp_path / "report.md").read_text()
