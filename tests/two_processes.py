"""Start two CPU processes as `accelerate launch` does, and compare what they leave with a run in one process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.run_directory import METRICS_FILE, read_metrics


def launch_two(*command: str, timeout: float = 500) -> str:
    """Run a Python script, or a module after `-m`, in two processes; what they printed.

    accelerate's own --cpu would start one process, so the environment asks for the CPU.
    """
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    # Port 0 is any free one, so that two runs of the tests on one machine do not meet.
    options += ["--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_same_run(
    run: Path, one: Path, *, roles: Sequence[str], tolerance: float = 1e-5, unmoved: str | None = None
) -> None:
    """Losses and gradient norms of every step, and the last weights of the roles, agree to `tolerance`.

    Weights whose name ends in `unmoved` have no gradient but rounding, which Adam scales up to its rate: not compared.
    """
    found, expected = (
        [record for record in read_metrics(folder / METRICS_FILE) if "note" not in record] for folder in (run, one)
    )
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for left, right in zip(found, expected, strict=True):
        names = [name for name in right if name.endswith(("_loss", "_grad_norm"))]
        assert names
        for name in names:
            assert left[name] == pytest.approx(right[name], rel=tolerance), (right["step"], name)
    last = max(one.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])).name
    left, right = (load_checkpoint(folder / last) for folder in (run, one))
    for name in roles:
        assert left.tensors[name].keys() == right.tensors[name].keys()
        for key, tensor in left.tensors[name].items():
            if unmoved is not None and key.endswith(unmoved):
                continue
            torch.testing.assert_close(
                tensor, right.tensors[name][key], rtol=tolerance, atol=tolerance, msg=f"{name} {key}"
            )
