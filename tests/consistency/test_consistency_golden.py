"""Three steps of every consistency objective against committed numbers.

After an intended change of the numerics, write them anew and look at the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/consistency/test_consistency_golden.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fewstep.consistency.train import train_step
from tests.consistency.tiny_consistency_run import OBJECTIVES, start_consistency, tiny_consistency
from tests.dmd.tiny_run import TinyInputs

GOLDEN = Path(__file__).parent / "golden.json"
SHOWN = ("consistency_loss", "tangent", "matching_loss", "fake_score_loss", "student_grad_norm")


def three_steps(inputs: TinyInputs, folder: Path, name: str) -> dict[str, Any]:
    """Losses of three steps, and how far they moved the student's weights."""
    config = tiny_consistency(inputs, folder, name)
    setup, trainer = start_consistency(config)
    before = [value.detach().clone() for _, value in setup.student_role.parameters]
    losses = []
    for _ in range(3):
        metrics = train_step(config, setup, trainer)
        losses.append({key: float(metrics[key]) for key in SHOWN if key in metrics})
        trainer.advance()
    trainer.close()
    pairs = zip(setup.student_role.parameters, before, strict=True)
    moved = sum(float((value.detach() - old).double().abs().sum()) for (_, value), old in pairs)
    return {"losses": losses, "moved": moved / sum(value.numel() for value in before)}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_steps_give_the_committed_numbers(inputs: TinyInputs, tmp_path: Path, name: str) -> None:
    found = three_steps(inputs, tmp_path, name)
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        known[name] = found
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    for losses, golden in zip(found["losses"], known[name]["losses"], strict=True):
        assert losses == pytest.approx(golden, rel=1e-4, abs=1e-7)
    assert found["moved"] == pytest.approx(known[name]["moved"], rel=2e-3)
    assert 1e-4 < found["moved"] < 1e-2


def test_committed_numbers_tell_the_objectives_apart() -> None:
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert known.keys() == OBJECTIVES.keys()
    assert len({round(case["moved"], 12) for case in known.values()}) == len(known)
