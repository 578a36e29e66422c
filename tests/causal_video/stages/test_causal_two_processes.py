"""Two processes train causal students as one does: the packed mask with its tangent, rollouts that are judged."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fewstep.causal_video.stages.sections import RedmdConfig
from fewstep.causal_video.stages.train import train_causal_video
from fewstep.core.config import save_resolved
from fewstep.evaluation.scorers.settings import ScorerConfig
from tests.causal_video.tiny_causal_run import FAKE_SCORE, VideoInputs, tiny_causal
from tests.two_processes import assert_same_run, launch_two

REWARD = RedmdConfig(scorers=(ScorerConfig(name="stroke_weight"),), saliency=True)
SCRIPT = Path(__file__).parents[3] / "scripts" / "train_causal_video.py"
ROLES = {
    "tf_scm": ("student", "student_ema"),
    "tf_anyflow": ("student", "student_ema"),
    "self_forcing_jumps": ("student", "student_ema", "fake_score"),
    "self_forcing_asd": ("student", "student_ema", "fake_score", "discriminator"),
    "self_forcing_gan": ("student", "student_ema", "fake_score"),
    "self_forcing_joint": ("student", "student_ema", "fake_score"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", ROLES)
def test_two_processes_train_a_causal_student_as_one_does(inputs: VideoInputs, tmp_path: Path, case: str) -> None:
    changes: dict[str, Any] = {"redmd": REWARD} if case == "self_forcing_asd" else {}
    if case == "self_forcing_gan":
        # At chance the gradient of the logit's bias is rounding, which Adam would scale up to its rate.
        optimizer = dataclasses.replace(FAKE_SCORE.optimizer, eps=1e-3)
        changes["fake_score"] = dataclasses.replace(FAKE_SCORE, optimizer=optimizer)
    save_resolved(tmp_path / "two.yaml", tiny_causal(inputs, tmp_path / "two", case, changes))
    assert "2 process(es) on cpu" in launch_two(str(SCRIPT), "--config", str(tmp_path / "two.yaml"))
    assert train_causal_video(tiny_causal(inputs, tmp_path / "one", case, changes)) == 0
    # The discriminator compares two logits, so that their common bias cancels.
    assert_same_run(tmp_path / "two", tmp_path / "one", roles=ROLES[case], unmoved="logit.bias")
