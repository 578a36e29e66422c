"""The best weights of a run by a figure of its validation: `best/checkpoint-N`, with the student's average alone.

It is written as whole as any checkpoint, and exported by `--checkpoint best`; a run cannot go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.core.training.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint, set_aside_newer
from fewstep.core.weights import EMA_FILE

BEST_FOLDER = "best"


def save_best(run: Path, step: int, average: Mapping[str, Tensor], *, figure: str, value: float) -> Path:
    """Write the average after `step` steps in place of the best so far. Raises OSError as `save_checkpoint`."""
    state = {"figure": figure, "value": value}
    return save_checkpoint(run / BEST_FOLDER, step, tensors={EMA_FILE: average}, state=state, keep=1)


def best_checkpoint(run: str | Path) -> Path | None:
    """The best weights of a run, None for one without validation. Raises ValueError for a damaged one."""
    return latest_checkpoint(Path(run) / BEST_FOLDER)


def go_back_to(run: Path, step: int) -> int | None:
    """Set aside a best that is later than `step`, where a run goes on; the step of the one that is left."""
    folder = run / BEST_FOLDER
    set_aside_newer(folder, step)
    left = list_checkpoints(folder)
    return int(left[-1].name.rpartition("-")[2]) if left else None
