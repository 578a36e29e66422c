from __future__ import annotations

import dataclasses
import json
import platform
import struct
from pathlib import Path

import pytest
import torch

from fewstep.core.config import OptimizerConfig, load_config
from fewstep.core.training.checkpoint import save_checkpoint
from fewstep.core.training.run_directory import RunDirectory, describe_environment, read_metrics


def save(path: Path, step: int) -> Path:
    return save_checkpoint(path, step, tensors={"w": {"a": torch.ones(2)}}, state={}, keep=9)


def test_new_directory_is_made_and_may_be_used_again_before_its_first_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "deep" / "run")
    assert directory.samples.is_dir()
    assert directory.resume_path is None
    assert directory.sample_path(20) == tmp_path / "deep" / "run" / "samples" / "step-0000020.png"
    assert RunDirectory(tmp_path / "deep" / "run").path == directory.path


def test_a_run_with_checkpoints_is_not_overwritten(tmp_path: Path) -> None:
    latest = [save(tmp_path, step) for step in (5, 10)][-1]
    with pytest.raises(ValueError, match=r"up to checkpoint-10; continue it with --resume latest or choose another"):
        RunDirectory(tmp_path)
    assert RunDirectory(tmp_path, resume="latest").resume_path == latest
    assert RunDirectory(tmp_path, resume=str(tmp_path / "checkpoint-5")).resume_path == tmp_path / "checkpoint-5"


def test_resume_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        RunDirectory(tmp_path / "run", resume="latest")
    assert not (tmp_path / "run").exists()
    save(tmp_path / "run", 1)
    other = save(tmp_path / "other", 1)
    with pytest.raises(ValueError, match=r"holds checkpoints of its own and .*other"):
        RunDirectory(tmp_path / "run", resume=str(other))
    assert RunDirectory(tmp_path / "third", resume=str(other)).resume_path == other
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "file")


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.begin(0)
    for step in range(1, 8):
        directory.append({"step": step, "loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    later = save(tmp_path, 6)
    assert directory.begin(4) == [later.with_name("checkpoint-6.abandoned")]
    for step in range(5, 10):
        directory.append({"step": step, "loss": 1 / step})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 10))
    assert [record["loss"] for record in records] == [1 / step for step in range(1, 10)]


def test_a_new_run_drops_metrics_of_one_that_never_reached_a_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.append({"step": 3, "loss": 1.0})
    directory.begin(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_metrics_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a record"):
        directory.begin(1)
    with pytest.raises(ValueError, match=r"needs a step, given \['loss'\]"):
        directory.append({"loss": 1.0})


def test_values_that_are_not_finite_stay_visible_in_valid_json(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.append({"step": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1e-300, "note": "x"})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "a": "nan",
        "b": "inf",
        "c": "-inf",
        "d": 1e-300,
        "note": "x",
    }


def test_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = OptimizerConfig(learning_rate=1e-5, betas=(0.0, 0.999), clip=None)
    path = RunDirectory(tmp_path).write_config(config)
    assert load_config(OptimizerConfig, ["--config", str(path)], prog="x", description="x")[0] == config
    assert dataclasses.asdict(config)["learning_rate"] == 1e-5


def test_environment_names_versions_and_no_places(tmp_path: Path) -> None:
    path = RunDirectory(tmp_path).write_environment(torch.device("cpu"), processes=2)
    environment = json.loads(path.read_text())
    assert environment == describe_environment(torch.device("cpu"), processes=2)
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert (environment["processes"], environment["device"]) == (2, "cpu")
    assert platform.node() not in path.read_text()
    assert "/" not in path.read_text()


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.begin(0)
    directory.scalars(3, {"loss": 0.25})
    directory.close()
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 1
    assert struct.pack("<f", 0.25) in files[0].read_bytes()
