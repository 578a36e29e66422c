"""Inputs of tiny runs and a server that starts them, shared by the tests of the loop."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dmd.run_server import RunServer
from tests.dmd.tiny_run import TinyInputs, write_inputs


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of these tests are those of a CPU, also on a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> TinyInputs:
    """A tiny teacher and data on disk."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def server() -> Iterator[RunServer]:
    """Starts training runs as processes of their own."""
    running = RunServer()
    yield running
    running.close()


@pytest.fixture
def broken_teacher(inputs: TinyInputs, tmp_path: Path) -> Path:
    """A copy of the teacher to break."""
    return Path(shutil.copytree(inputs.teacher, tmp_path / "broken_teacher"))
