"""Two processes train together what one process trains alone, and each goes on where the other stopped."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.config import save_resolved
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.dmd.config import DmdConfig, ReflConfig
from fewstep.dmd.train import train_dmd
from fewstep.evaluation.scorers.settings import ScorerConfig
from tests.dmd.run_server import SCRIPT, Run, RunServer
from tests.dmd.tiny_run import WITH_GAN, TinyInputs, changed, measured, tiny_config
from tests.two_processes import launch_two

# Processes of their own are slow on a busy machine.
pytestmark = pytest.mark.timeout(600)

# Two student steps, so that the processes must agree on the step with the gradient; the GAN brings the heads in, the
# reward a gradient of its own.
REWARD = ReflConfig(scorers=(ScorerConfig(name="stroke_weight"),))
CHANGES = {"student.steps": 2, "run.steps": 6, **WITH_GAN, "refl": REWARD}
LOSSES = (
    "student_loss",
    "refl_loss",
    "fake_score_loss",
    "discriminator_loss",
    "student_gan_loss",
)


def config_of(inputs: TinyInputs, directory: Path, changes: dict[str, Any] | None = None) -> DmdConfig:
    return tiny_config(inputs, directory, {**CHANGES, **(changes or {})})


@pytest.fixture(scope="module")
def one(inputs: TinyInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run in one process."""
    directory = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert train_dmd(config_of(inputs, directory)) == 0
    return directory


def assert_close_runs(run: Path, one: Path, *, first_step: int = 1) -> None:
    """Losses of the steps to 1e-5; weights and EMA to a hundredth of what one update moves them."""
    found, expected = measured(run), measured(one)[first_step - 1 :]
    assert [record["step"] for record in found] == list(range(first_step, 7))
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name in LOSSES:
            if name in right:
                assert left[name] == pytest.approx(right[name], rel=1e-5), (right["step"], name)
    left, right = (load_checkpoint(folder / "checkpoint-6") for folder in (run, one))
    for name in ("student", "student_ema", "fake_score"):
        assert left.tensors[name].keys() == right.tensors[name].keys()
        for key, tensor in left.tensors[name].items():
            torch.testing.assert_close(tensor, right.tensors[name][key], rtol=1e-5, atol=1e-5, msg=f"{name} {key}")


def start_two(server: RunServer, folder: Path, *arguments: str) -> list[Run]:
    """Two processes as a launcher would start them, forked from the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        server.start(
            *arguments,
            log=folder / f"log-{rank}.txt",
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]


@pytest.mark.slow
def test_two_processes_equal_one_and_one_goes_on(inputs: TinyInputs, one: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run")
    save_resolved(tmp_path / "config.yaml", config)
    assert "2 process(es) on cpu" in launch_two(str(SCRIPT), "--config", str(tmp_path / "config.yaml"))
    assert_close_runs(tmp_path / "run", one)
    assert load_checkpoint(tmp_path / "run" / "checkpoint-3").tensors["generators"]["cpu"].shape[0] == 2

    alone = changed(config, {"run.resume": str(tmp_path / "run" / "checkpoint-3")})
    assert train_dmd(alone) == 0
    assert_close_runs(tmp_path / "run", one)
    assert load_checkpoint(tmp_path / "run" / "checkpoint-6").tensors["generators"]["cpu"].shape[0] == 1


@pytest.mark.slow
def test_two_processes_go_on_from_one(inputs: TinyInputs, server: RunServer, one: Path, tmp_path: Path) -> None:
    save_resolved(tmp_path / "config.yaml", config_of(inputs, tmp_path / "run"))
    runs = start_two(server, tmp_path, "--config", str(tmp_path / "config.yaml"), "--resume", str(one / "checkpoint-3"))
    assert [run.wait() for run in runs] == [0, 0], runs[0].log.read_text(encoding="utf-8")[-3000:]
    assert_close_runs(tmp_path / "run", one, first_step=4)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(inputs: TinyInputs, server: RunServer, tmp_path: Path) -> None:
    save_resolved(tmp_path / "config.yaml", config_of(inputs, tmp_path / "run", {"run.batch_size": 5}))
    runs = start_two(server, tmp_path, "--config", str(tmp_path / "config.yaml"))
    assert [run.wait() for run in runs] == [1, 1]
    assert "batch_size: given 5, allowed are multiples of 2" in runs[1].log.read_text(encoding="utf-8")
