"""A scorer that fails: the error, and what is kept of a step in which it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fewstep.core.training.processes import Processes
from fewstep.core.training.run import Run


class RewardError(RuntimeError):
    """A scorer failed. `clean`: no weight has changed since the step began, so its start can be saved."""

    def __init__(self, message: str, *, clean: bool) -> None:
        super().__init__(message)
        self.clean = clean


def agree(failure: Exception | None, processes: Processes, *, step: int) -> None:
    """Raise RewardError on every process when one has a failure."""
    if processes.maximum([int(failure is not None)])[0]:
        told = "another process" if failure is None else f"{type(failure).__name__}: {failure}"
        raise RewardError(f"step {step}: the reward failed ({told})", clean=True) from failure


@contextmanager
def keeping_failures(run: Run[Any]) -> Iterator[None]:
    """Where a scorer fails before a weight has changed, save the start of the step; the error says how to go on."""
    try:
        yield
    except RewardError as error:
        path = run.save_unfinished() if error.clean else run.trainer.last_checkpoint
        told = f"{error}; no checkpoint was written yet: mend the scorer and start again"
        if path is not None:
            told = f"{error}; nothing of this step was kept: mend the scorer and continue with --resume {path}"
        raise RewardError(told, clean=error.clean) from error
