"""The frame of a run: what happens around the steps, in which order, and what a loop must not forget."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.core.config import OptimizerConfig, RunConfig
from fewstep.core.training.checkpoint import load_checkpoint
from fewstep.core.training.ema import EmaSettings
from fewstep.core.training.run import Run, open_run
from fewstep.core.training.run_directory import read_metrics


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@dataclass(frozen=True)
class Settings:
    """The least that a run needs."""

    run: RunConfig


def settings(directory: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        **{"seed": 0, "steps": 4, "batch_size": 1, "checkpoint_every": 2, "keep_checkpoints": 9},
        **{"sample_every": 3, "log_every": 1},
    }
    return Settings(RunConfig(directory=str(directory), **(values | changes)))


@dataclass
class Recorder:
    """A watch that remembers what it was asked, in order."""

    seen: list[str] = field(default_factory=list)
    count: int = 0

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        self.seen.append(f"load {self.count}")

    def begin(self) -> None:
        self.seen.append("begin")

    def measure(self) -> Mapping[str, float]:
        self.count += 1
        return {"measured": float(self.count)}

    def look_at(self, means: Mapping[str, float] | None) -> None:
        assert means is not None
        self.seen.append(f"look {means['measured']:g}")

    def save_samples(self) -> None:
        self.seen.append("samples")


def train(config: Settings, watch: Recorder, *, stop: int | None = None) -> tuple[Run[Any], nn.Linear]:
    """Steps of gradient descent on one number."""
    layer = nn.Linear(1, 1)
    with open_run(config) as run:
        role = run.trainer.add_role("student", layer, OptimizerConfig(learning_rate=0.1), ema=EmaSettings(0.5))
        for step in run.steps(watch, lambda: "hello", lambda: None, beside=lambda path: (path / "beside").touch()):
            if step == stop:
                break
            loss = layer(torch.ones(1, 1)).square().mean()
            run.trainer.backward(loss)
            run.trainer.update(role)
            run.finish_step({"loss": loss.detach()})
    return run, layer


def test_the_order_of_a_run(tmp_path: Path) -> None:
    watch = Recorder()
    run, _ = train(settings(tmp_path / "run"), watch)
    assert run.exit_code == 0
    assert watch.seen == ["begin", "look 1", "look 2", "look 3", "samples", "look 4"]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["note"] for record in records if "note" in record] == ["hello"]
    assert [record["measured"] for record in records if "measured" in record] == [1.0, 2.0, 3.0, 4.0]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "run" / "beside").is_file()


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, whole = train(settings(tmp_path / "whole"), Recorder())
    torch.manual_seed(0)
    train(settings(tmp_path / "cut", steps=2), Recorder())
    watch = Recorder()
    _, resumed = train(settings(tmp_path / "cut", resume="latest"), watch)
    assert watch.seen == ["load 2", "look 3", "samples", "look 4"]
    assert torch.equal(resumed.weight, whole.weight)


def test_a_dry_run_makes_one_step_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Recorder()
    run, _ = train(settings(tmp_path / "run", dry_run=True), watch)
    assert (run.exit_code, run.trainer.step, watch.seen) == (0, 0, [])
    assert "dry run: one step was made, nothing is kept" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert not run.directory.path.exists()


def test_a_step_that_is_not_finished_is_an_error(tmp_path: Path) -> None:
    with open_run(settings(tmp_path)) as run:
        run.trainer.add_role("student", nn.Linear(1, 1), OptimizerConfig(learning_rate=0.1))
        with pytest.raises(RuntimeError, match="step 0 was not finished; call finish_step once in each step"):
            for _ in run.steps(Recorder()):
                ...
    with open_run(settings(tmp_path)) as run:
        run.trainer.add_role("student", nn.Linear(1, 1), OptimizerConfig(learning_rate=0.1))
        next(run.steps(Recorder()))
        run.finish_step({"loss": 0.0})
        with pytest.raises(RuntimeError, match="step 0 was finished already"):
            run.finish_step({"loss": 0.0})


def test_everything_is_closed_however_a_run_ends(tmp_path: Path) -> None:
    closed: list[str] = []

    def fail() -> None:
        with open_run(settings(tmp_path)) as run:
            run.on_close(lambda: closed.append("scorer"))
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert closed == ["scorer"]


def test_the_start_of_a_failed_step_is_saved_once(tmp_path: Path) -> None:
    watch = Recorder()
    run, _ = train(settings(tmp_path / "run", checkpoint_every=100), watch, stop=3)
    path = run.save_unfinished()
    assert path is not None
    assert path.name == "checkpoint-3"
    assert run.save_unfinished() == path
    assert load_checkpoint(path).state["extra"] == {"count": 3}
    dry, _ = train(settings(tmp_path / "dry", dry_run=True), Recorder())
    assert dry.save_unfinished() is None
