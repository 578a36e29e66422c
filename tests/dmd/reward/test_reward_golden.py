"""Two steps of every reward method against committed numbers.

After an intended change of the numerics, write them anew and look at the difference:

    UPDATE_GOLDEN=1 python -m pytest tests/dmd/reward/test_reward_golden.py
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fewstep.dmd.reward.config import RewardMatchingConfig, RewardRunConfig, ScorerConfig
from fewstep.dmd.reward.sections import CrdConfig, DecayConfig, TiltedTeacherConfig
from fewstep.dmd.reward.train import train_step
from tests.dmd.reward.reward_run import (
    MATCHED,
    METHODS,
    reward_config,
    started,
    wake_heads,
    with_pixel_gan,
    write_latent_reward,
    write_pixel_backbone,
    write_student,
)
from tests.dmd.test_golden import checksum
from tests.dmd.tiny_run import TinyInputs

GOLDEN = Path(__file__).parent / "golden.json"
WATCHED = ("student_loss", "policy_loss", "direct_loss", "fake_score_loss", "reward", "margin", "effective_share", "kl")
WATCHED += ("student_gan_loss", "discriminator_loss", "distill_loss", "latent_reward", "tilted_teacher_reward")
# Where the settings of the other tests make the second step blind: policies that differ, and no cold start.
CHANGES: dict[str, dict[str, Any]] = {
    "rtdmd": {"matching.cold_start_steps": 0},
    "crd": {"crd": CrdConfig(kl_weight=0.1, lowest_kl_weight=1e-4, old=DecayConfig(start=0.5))},
    "redmd_saliency": {
        "redmd.saliency": True,
        "reward.scorers": (ScorerConfig(name="stroke_weight", mean=0.5, std=0.01), ScorerConfig(name="slant")),
        "reward.held_out": (),
    },
    "nft_anchored": {**MATCHED, "matching": RewardMatchingConfig(weight=0.5), "nft.adaptive": True},
    "euphonium_distilled": {"euphonium.distill_weight": 0.5},
    "rtdmd_tilted_teacher": {
        "matching.cold_start_steps": 0,
        "rtdmd.direct": None,
        "rtdmd.tilted_teacher": TiltedTeacherConfig(tilt_scale=50.0),
    },
}
VARIANTS = {
    "redmd_saliency": "redmd",
    "nft_anchored": "nft",
    "flash_gan": "flash",
    "flash_latent": "flash",
    "euphonium_distilled": "euphonium",
    "rtdmd_tilted_teacher": "rtdmd",
}
CASES = {**{method: method for method in METHODS}, **VARIANTS}


@pytest.fixture(scope="module")
def student(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return write_student(inputs, tmp_path_factory.mktemp("student") / "run")


def golden_config(inputs: TinyInputs, student: Path, folder: Path, name: str) -> RewardRunConfig:
    """Settings of a case, with the files that it reads written into the folder."""
    changes = CHANGES.get(name, {})
    if name == "flash_gan":
        changes = with_pixel_gan(inputs, write_pixel_backbone(folder / "backbone"))
    if name == "flash_latent":
        changes = {"flash.latent_reward": str(write_latent_reward(inputs, folder / "latent_reward"))}
    return reward_config(inputs, student, folder / "run", CASES[name], changes)


def two_steps(inputs: TinyInputs, student: Path, folder: Path, name: str) -> dict[str, Any]:
    """What two steps report, and checksums of the student after them."""
    steps = []
    with started(golden_config(inputs, student, folder, name)) as (method, trainer):
        wake_heads(method.setup)
        role = method.setup.student_role
        before = {key: weight.detach().clone() for key, weight in role.parameters}
        for _ in range(2):
            metrics = train_step(method, trainer)
            steps.append({key: float(metrics[key]) for key in WATCHED if key in metrics})
            trainer.advance()
        return {"steps": steps, "student": checksum(role, before)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_steps_give_the_committed_numbers(inputs: TinyInputs, student: Path, tmp_path: Path, name: str) -> None:
    found = two_steps(inputs, student, tmp_path, name)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
        GOLDEN.write_text(json.dumps({**known, name: found}, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert len(found["steps"]) == 2
    for step, golden in zip(found["steps"], expected["steps"], strict=True):
        # A policy loss is a mean of advantages, which sum to zero: its rounding is absolute.
        assert step == pytest.approx(golden, rel=1e-4, abs=1e-5)
    assert found["student"]["weights"] == pytest.approx(expected["student"]["weights"], rel=1e-5)
    assert found["student"]["moved"] == pytest.approx(expected["student"]["moved"], rel=5e-3)
    assert 1e-4 < found["student"]["moved"] < 4e-3


def test_committed_numbers_tell_the_methods_apart() -> None:
    record = json.loads(GOLDEN.read_text(encoding="utf-8"))
    seen = {f"{record[name]['student']['moved']:.6g}" for name in CASES}
    assert len(seen) == len(CASES) == 14
