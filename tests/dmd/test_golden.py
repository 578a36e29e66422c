"""Two steps of every objective against committed numbers.

After an intended change of the numerics, write them anew and look at the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/dmd/test_golden.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fewstep.core.config import OptimizerConfig
from fewstep.core.training.roles import Role
from fewstep.dmd.config import FDistillObjective, SidObjective
from fewstep.dmd.train import train_step
from tests.dmd.tiny_run import WITH_GAN, WITH_REGRESSION, TinyInputs, start, tiny_config

# The two steps with the gradient are 0, 1 of a two-step and 2, 3 of a four-step student.
SEED = 9
GOLDEN = Path(__file__).parent / "golden"
# A discriminator that tells samples apart after one update, so that f-distill's weights differ from one.
QUICK_GAN = {**WITH_GAN, "fake_score.optimizer": OptimizerConfig(learning_rate=0.02, weight_decay=0.0)}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dmd": {},
    "dmd_gan": QUICK_GAN,
    "dmd_regression": WITH_REGRESSION,
    "sid": {"dmd": None, "sid": SidObjective()},
    "f_distill": {"dmd": None, "f_distill": FDistillObjective(), **QUICK_GAN},
}
CASES = [(name, steps) for name in OBJECTIVES for steps in (1, 2, 4) if name != "dmd_regression" or steps == 1]
LOSSES = ("student_loss", "student_gan_loss", "regression_loss", "fake_score_loss", "discriminator_loss")


def checksum(role: Role, before: dict[str, Tensor]) -> dict[str, float]:
    """Root sum of squares of the trained weights, and how far the steps moved an element on average."""
    pairs = [(parameter.detach().double(), before[name].double()) for name, parameter in role.parameters]
    squares = sum(float(weight.square().sum()) for weight, _ in pairs)
    moved = sum(float((weight - old).abs().sum()) for weight, old in pairs)
    return {"weights": squares**0.5, "moved": moved / sum(weight.numel() for weight, _ in pairs)}


def two_steps(inputs: TinyInputs, folder: Path, name: str, steps: int) -> dict[str, Any]:
    """Losses of two steps, with both networks updated in each, and checksums of the weights after them."""
    changes = {"run.seed": SEED, "student.steps": steps, "fake_score.ratio": 1, **OBJECTIVES[name]}
    config = tiny_config(inputs, folder, changes)
    setup, trainer = start(config)
    roles = (setup.student_role, setup.fake_role)
    before = [{name: value.detach().clone() for name, value in role.parameters} for role in roles]
    losses = []
    for _ in range(2):
        metrics = train_step(config, setup, trainer)
        losses.append({key: float(metrics[key]) for key in LOSSES if key in metrics})
        trainer.advance()
    trainer.close()
    sums = {role.name: checksum(role, start) for role, start in zip(roles, before, strict=True)}
    return {"losses": losses, **sums}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), CASES)
def test_two_steps_give_the_committed_numbers(inputs: TinyInputs, tmp_path: Path, name: str, steps: int) -> None:
    found, path = two_steps(inputs, tmp_path, name, steps), GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps({**known, f"{steps}_step": found}, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))[f"{steps}_step"]
    assert len(found["losses"]) == 2
    for losses, golden in zip(found["losses"], expected["losses"], strict=True):
        # SiD's loss is a small sum of terms of both signs, whose rounding is absolute: 3e-9 on another instruction set.
        assert losses == pytest.approx(golden, rel=1e-5, abs=2e-8)
    for role in ("student", "fake_score"):
        assert found[role]["weights"] == pytest.approx(expected[role]["weights"], rel=1e-5)
        # Adam moves an element whose gradient is only rounding as far as the others.
        assert found[role]["moved"] == pytest.approx(expected[role]["moved"], rel=1e-3)
        assert 1e-4 < found[role]["moved"] < 4e-2


def test_committed_numbers_tell_the_objectives_apart() -> None:
    seen = []
    for name, steps in CASES:
        record = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))[f"{steps}_step"]
        seen.append(record["losses"][1]["student_loss"])
    assert len({f"{value:.4g}" for value in seen}) == len(CASES) == 13
