"""Where a report comes from: command, versions, hardware. Names of hosts and users stay out."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "torchmetrics", "open-clip-torch")
CPU_LIST = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Provenance:
    """How a report was made; `date` is the UTC day, `versions` are (package, version)."""

    command: str
    date: str
    python: str
    versions: tuple[tuple[str, str], ...]
    hardware: str
    threads: int


def processor_name() -> str:
    """The CPU's model name as the system tells it, or its architecture."""
    if CPU_LIST.is_file():
        for line in CPU_LIST.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def program_name() -> str:
    """The program that runs, as one would type it: scripts/x.py below the working directory, else its name alone."""
    path = Path(sys.argv[0])
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return path.name


def collect_provenance(program: str, *, arguments: Sequence[str], device: str = "cpu") -> Provenance:
    """The provenance of `python program arguments` run on `device`."""
    hardware = processor_name()
    if torch.device(device).type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, {hardware}"
    return Provenance(
        command=shlex.join(["python", program, *arguments]),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        python=platform.python_version(),
        versions=tuple((package, _version(package)) for package in PACKAGES),
        hardware=hardware,
        threads=torch.get_num_threads(),
    )
