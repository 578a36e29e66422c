"""Inputs of tiny runs, shared by the tests of the training stages."""

import pytest

from tests.causal_video.tiny_causal_run import VideoInputs, write_inputs


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of these tests are those of a CPU, also on a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> VideoInputs:
    """A tiny teacher, videos and weights on disk."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
