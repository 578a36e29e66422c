"""The folder of one run: configuration, environment, metrics, samples and checkpoints.

config.yaml       the resolved configuration
environment.json  versions, device and threads of the last start
metrics.jsonl     one record per logged step, steps ascending, each once
tensorboard/      the same numbers, and the grids, for TensorBoard, where it is among run.trackers
samples/          grids of samples
checkpoint-N/     complete checkpoints after N steps
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.core.config import save_resolved
from fewstep.core.training.best import set_aside_best
from fewstep.core.training.checkpoint import find_resume, list_checkpoints, set_aside_newer
from fewstep.core.training.trackers import Trackers

CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE = "config.yaml", "environment.json", "metrics.jsonl"
GRID_NAME = re.compile(r"step-(\d+)\.png")
_PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


class RunDirectory:
    """The files of a run. Only the first process of a run may call its writing methods.

    `resume` is None for a new run, 'latest', or the path of a checkpoint; `resume_path` is the checkpoint it means.

    Raises:
        ValueError: a new run where checkpoints are, a checkpoint that is missing or damaged, or a checkpoint of another
            run for a directory that has its own.
    """

    def __init__(
        self, path: str | Path, *, resume: str | None = None, trackers: Sequence[str] = ("tensorboard",)
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run directory {self.path} is a file; choose another directory")
        existing = list_checkpoints(self.path)
        if resume is None and existing:
            raise ValueError(
                f"run directory {self.path} already holds a run up to {existing[-1].name}; "
                "continue it with --resume latest or choose another directory"
            )
        self.resume_path = None if resume is None else find_resume(self.path, resume)
        if existing and self.resume_path is not None and self.resume_path.resolve().parent != self.path.resolve():
            raise ValueError(
                f"run directory {self.path} holds checkpoints of its own and {self.resume_path} is of another run; "
                "choose an empty directory"
            )
        self.samples = self.path / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        self.trackers = Trackers(trackers, self.path)

    def write_config(self, config: Any) -> Path:
        """Keep the resolved configuration, a dataclass, as a file that reads back to an equal one."""
        save_resolved(self.path / CONFIG_FILE, config)
        return self.path / CONFIG_FILE

    def write_environment(self, device: torch.device, *, processes: int) -> Path:
        """Keep versions, device and threads; neither paths nor the name of the machine."""
        path = self.path / ENVIRONMENT_FILE
        path.write_text(json.dumps(describe_environment(device, processes=processes), indent=2) + "\n", "utf-8")
        return path

    def sample_path(self, step: int) -> Path:
        """Where the grid of samples after `step` steps belongs."""
        return self.samples / f"step-{step:07d}.png"

    def begin(self, step: int) -> list[Path]:
        """Start writing after `step` steps: drop later metrics and set later checkpoints aside; returns the latter.

        A last line that a killed run left unfinished is dropped too.

        Raises:
            ValueError: another line of metrics.jsonl is not a record.
        """
        self.close()
        path = self.path / METRICS_FILE
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for number, line in enumerate(lines, start=1) if self._is_kept(line, number, lines, step)]
            replacement = path.with_name(f".{METRICS_FILE}.partial")
            replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            replacement.replace(path)
        self.trackers.begin(step)
        # A new run has no best weights, also where one was killed before it had saved anything else.
        set_aside_best(self.path, step if self.resume_path is not None else -1)
        return set_aside_newer(self.path, step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record with a `step` to metrics.jsonl and flush it.

        Raises:
            ValueError: there is no step. A number that is not finite is written as a string: 'nan', 'inf' or '-inf'.
        """
        if "step" not in record:
            raise ValueError(f"a record of metrics needs a step, given {sorted(record)}")
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({name: _finite_or_word(value) for name, value in record.items()}) + "\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand numbers to the trackers, which start at the first call."""
        self.trackers.scalars(step, values)

    def show_samples(self, step: int) -> None:
        """Hand the grid of samples after `step` steps to the trackers."""
        if self.sample_path(step).is_file():
            self.trackers.picture(step, self.sample_path(step))

    def close(self) -> None:
        """Flush and close what is open."""
        self.trackers.close()

    def _is_kept(self, line: str, number: int, lines: list[str], step: int) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                return False
            raise ValueError(
                f"{self.path / METRICS_FILE}, line {number} is not a record of metrics; repair or remove the file"
            ) from error


def sample_grids(run: str | Path) -> list[tuple[int, Path]]:
    """The grids of samples of a run with their steps, ascending; other pictures beside them count for nothing."""
    named = [(GRID_NAME.fullmatch(path.name), path) for path in Path(run).glob("samples/*.png")]
    return sorted((int(match[1]), path) for match, path in named if match is not None)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def describe_environment(device: torch.device, *, processes: int) -> dict[str, Any]:
    """Versions, device name and threads of this process, without paths and names of machines."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "packages": versions,
        "device": device.type,
        "device_name": name,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _finite_or_word(value: Any) -> Any:
    """JSON has no NaN or infinity; a reader still must see that one was there."""
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return str(value) if isinstance(value, float) else value
