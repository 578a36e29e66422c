"""What all tests of studies share."""

import pytest


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of these tests are those of a CPU, also on a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
