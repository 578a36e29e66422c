"""Three steps of every stage against committed numbers.

After an intended change of the numerics, write them anew and look at the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/causal_video/stages/test_train_golden.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fewstep.causal_video.stages.train import train_step
from tests.causal_video.tiny_causal_run import CASES, VideoInputs, start_causal, tiny_causal

GOLDEN = Path(__file__).parent / "golden.json"
FIRST_STEP = 3
SHOWN = (
    "forcing_loss",
    "tangent",
    "student_loss",
    "student_asd_loss",
    "fake_score_loss",
    "discriminator_loss",
    "student_grad_norm",
)


def three_steps(inputs: VideoInputs, folder: Path, name: str) -> dict[str, Any]:
    """Losses of three steps, and how far they moved the student's weights.

    They are the steps 3, 4 and 5, in which self-forcing students stop at their second exit.
    """
    config = tiny_causal(inputs, folder, name)
    setup, trainer = start_causal(config)
    before = [value.detach().clone() for _, value in setup.student_role.parameters]
    losses, trainer.step = [], FIRST_STEP
    for _ in range(3):
        metrics = train_step(config, setup, trainer)
        losses.append({key: float(metrics[key]) for key in SHOWN if key in metrics})
        trainer.advance()
    trainer.close()
    pairs = zip(setup.student_role.parameters, before, strict=True)
    moved = sum(float((value.detach() - old).double().abs().sum()) for (_, value), old in pairs)
    return {"losses": losses, "moved": moved / sum(value.numel() for value in before)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_steps_give_the_committed_numbers(inputs: VideoInputs, tmp_path: Path, name: str) -> None:
    found = three_steps(inputs, tmp_path, name)
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        known[name] = found
        GOLDEN.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    for losses, golden in zip(found["losses"], known[name]["losses"], strict=True):
        assert losses == pytest.approx(golden, rel=2e-4, abs=1e-7)
    assert found["moved"] == pytest.approx(known[name]["moved"], rel=5e-3)
    assert 1e-5 < found["moved"] < 1e-2


def test_committed_numbers_tell_the_stages_apart() -> None:
    known = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert known.keys() == CASES.keys()
    # A replayed rollout has the gradient of the single graph, and is no stage of its own.
    same = {"self_forcing_replay", "self_forcing_long_replay"}
    different = {json.dumps(case["losses"]) for name, case in known.items() if name not in same}
    assert len(different) == len(known) - len(same) == 20
    for name in same:
        assert known[name]["losses"][0] == pytest.approx(known[name.removesuffix("_replay")]["losses"][0], rel=1e-5)
