"""Two processes train together what one trains alone: groups, advantages and weights do not know how they are cut."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.config import OptimizerConfig, save_resolved
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.dmd.reward.train import train_reward
from tests.dmd.reward.reward_run import reward_config, with_pixel_gan, write_pixel_backbone, write_student
from tests.dmd.tiny_run import TinyInputs, measured

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "train_reward.py"


def start_two(config: Path) -> list[subprocess.Popen[str]]:
    """Two processes as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), "--config", str(config)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["rtdmd", "crd", "flash"])
def test_two_processes_equal_one(inputs: TinyInputs, tmp_path: Path, method: str) -> None:
    """Flash with its discriminator, slowly: at chance the gradient of a bias is rounding."""
    student = write_student(inputs, tmp_path / "student")
    changes: dict[str, Any] = {"run.steps": 3}
    if method == "flash":
        slow = OptimizerConfig(learning_rate=1e-4)
        changes |= with_pixel_gan(inputs, write_pixel_backbone(tmp_path / "backbone"), optimizer=slow)
    assert train_reward(reward_config(inputs, student, tmp_path / "one", method, changes)) == 0
    config = reward_config(inputs, student, tmp_path / "two", method, changes)
    save_resolved(tmp_path / "config.yaml", config)
    processes = start_two(tmp_path / "config.yaml")
    for process in processes:
        _, told = process.communicate(timeout=500)
        assert process.returncode == 0, told[-3000:]
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert [record["step"] for record in two] == [record["step"] for record in one] == [0, 1, 2, 3]
    for left, right in zip(two[1:], one[1:], strict=True):
        assert left.keys() == right.keys()
        for name in ("student_loss", "fake_score_loss", "discriminator_loss", "reward", "reward_spread", "zero_share"):
            if name in right:
                assert left[name] == pytest.approx(right[name], rel=1e-3, abs=2e-5), (right["step"], name)
    left, right = (load_checkpoint(tmp_path / run / "checkpoint-3").tensors for run in ("two", "one"))
    for name in ("student", "student_ema"):
        for key, tensor in left[name].items():
            torch.testing.assert_close(tensor, right[name][key], rtol=1e-4, atol=5e-5, msg=f"{name} {key}")
