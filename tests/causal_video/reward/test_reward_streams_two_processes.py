"""Two processes make a causal student better by a reward as one does: one window, whole groups, one mean penalty."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.causal_video.reward.train import train_causal_reward
from fewstep.core.config import save_resolved
from fewstep.core.training.checkpoint import load_checkpoint
from tests.causal_video.reward.tiny_reward import reward_settings
from tests.causal_video.tiny_causal_run import VideoInputs
from tests.dmd.tiny_run import measured
from tests.two_processes import launch_two

SCRIPT = Path(__file__).parents[3] / "scripts" / "train_causal_reward.py"
# With this seed windows begin at other places and a candidate is held back; the other process holds none back.
CHANGES: dict[str, Any] = {"run.seed": 19, "penalty.weight": 1.0, "monitor.every": 100}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_by_a_reward_as_one_does(inputs: VideoInputs, tmp_path: Path) -> None:
    save_resolved(tmp_path / "two.yaml", reward_settings(inputs, tmp_path / "two", CHANGES))
    assert "2 process(es) on cpu" in launch_two(str(SCRIPT), "--config", str(tmp_path / "two.yaml"))
    assert train_causal_reward(reward_settings(inputs, tmp_path / "one", CHANGES)) == 0
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert [record["step"] for record in two] == [record["step"] for record in one] == [0, 1, 2]
    for left, right in zip(two[1:], one[1:], strict=True):
        assert left.keys() == right.keys()
        for name in ("student_loss", "policy_loss", "reference_penalty", "reward", "rank_gap", "student_grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=5e-3, abs=1e-7), (right["step"], name)
    assert one[2]["reference_penalty"] > 1e-4
    left, right = (load_checkpoint(tmp_path / run / "checkpoint-2") for run in ("two", "one"))
    assert left.state["extra"]["penalty"]["recent"] == right.state["extra"]["penalty"]["recent"]
    # Random candidates differ by 1e-4 in their ink, so fp32 rounding of the scores, which depends on the number of
    # threads, is up to 1e-3 of the advantages and of the gradient (4e-7 with equal rewards). A process that kept its
    # gradient to itself would be off by about 1. Adam makes whole steps of gradients near 0: vectors are compared.
    moments = [name for name in right.tensors["student_optimizer"] if name.endswith(".exp_avg")]
    assert len(moments) > 40
    assert distance(left.tensors["student_optimizer"], right.tensors["student_optimizer"], moments) < 1e-2
    start = load_checkpoint(tmp_path / "one" / "checkpoint-1").tensors["student"]
    for name in ("student", "old_policy", "reference"):
        keys = list(right.tensors[name])
        moved = distance(start, right.tensors[name], keys)
        assert moved > 1e-4
        assert distance(left.tensors[name], right.tensors[name], keys) < 5e-2 * moved, name


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """|left - right| / |right| of these tensors as one vector."""
    pair = [torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (left, right)]
    return float((pair[0] - pair[1]).norm() / pair[1].norm())
