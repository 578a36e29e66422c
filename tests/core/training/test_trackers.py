"""Trackers show what a run's own files hold; what is missing is an error before anything starts."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fewstep.core.config import RunConfig
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trackers import Trackers, require_trackers

NUMBERS: dict[str, Any] = {
    "steps": 4,
    "batch_size": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
    "sample_every": 1,
    "log_every": 1,
}


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def grid(folder: Path, step: int) -> Path:
    path = RunDirectory(folder, trackers=()).sample_path(step)
    Image.fromarray(np.full((8, 12, 3), 40 + step, np.uint8)).save(path)
    return path


def test_numbers_and_grids_reach_tensorboard(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    grid(tmp_path / "run", 2)
    for step in (1, 2, 3):
        directory.scalars(step, {"loss": 1.0 / step})
    directory.show_samples(2)
    # There is no grid of step 3, and nothing to show.
    directory.show_samples(3)
    directory.close()
    found = events(tmp_path / "run")
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx([1.0, 0.5, 1 / 3])
    (picture,) = found.Images("samples")
    assert (picture.step, picture.height, picture.width) == (2, 8, 12)


def test_a_resumed_run_replaces_what_came_later(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        directory.scalars(step, {"loss": float(step)})
    directory.begin(1)
    directory.scalars(2, {"loss": 20.0})
    directory.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_none_writes_nothing(tmp_path: Path) -> None:
    directory = RunDirectory(
        tmp_path, trackers=RunConfig(directory="x", seed=0, trackers=("none",), **NUMBERS).shown_by
    )
    directory.scalars(1, {"loss": 1.0})
    directory.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples"]


def test_what_is_missing_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"run\.trackers names mlflow, which is not installed: pip install mlflow"):
        Trackers(("tensorboard", "mlflow"), tmp_path)
    # As the package is without a key.
    package = types.ModuleType("wandb")
    package.__spec__ = sys.__spec__
    package.api = types.SimpleNamespace(api_key=None)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(ValueError, match=r"it has no key: run `wandb login`, set WANDB_API_KEY"):
        require_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(["wandb"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ((), "a list of different ones"),
        (("wandb", "wandb"), "a list of different ones"),
        (("none", "wandb"), "none stands alone"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(trackers: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(directory="x", seed=0, trackers=trackers, **NUMBERS)  # pyright: ignore[reportArgumentType]
