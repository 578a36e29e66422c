"""The best weights of a run by a figure of its validation: `best/checkpoint-N`, with the student's average alone.

It is written as whole as any checkpoint, and exported by `--checkpoint best`; a run cannot go on from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fewstep.core.training.checkpoint import latest_checkpoint, list_checkpoints, save_checkpoint, set_aside_newer
from fewstep.core.weights import EMA_FILE

BEST_FOLDER = "best"


def save_best(run: Path, step: int, average: Mapping[str, Tensor], *, figure: str, value: float) -> Path:
    """Write the average after `step` steps in place of the best so far. Raises OSError as `save_checkpoint`."""
    folder, state = run / BEST_FOLDER, {"figure": figure, "value": value}
    found = save_checkpoint(folder, step, tensors={EMA_FILE: average}, state=state, keep=1)
    # Those that a run has left are as large, and a smaller step may have taken the place of a larger one.
    for other in folder.glob("checkpoint-*"):
        if other != found:
            shutil.rmtree(other)
    return found


def best_checkpoint(run: str | Path) -> Path | None:
    """The best weights of a run, None for one without validation. Raises ValueError for a damaged one."""
    return latest_checkpoint(Path(run) / BEST_FOLDER)


def best_step(run: str | Path) -> int | None:
    """The step of the best weights, None where there are none."""
    found = list_checkpoints(Path(run) / BEST_FOLDER)
    return int(found[-1].name.rpartition("-")[2]) if found else None


def set_aside_best(run: Path, step: int) -> list[Path]:
    """Set aside best weights that are later than `step`, from which a run goes on; -1 before it begins."""
    return set_aside_newer(run / BEST_FOLDER, step)


def has_left_better(run: Path) -> bool:
    """Whether best weights were set aside: then those before them were replaced, and are to be beaten."""
    return any((run / BEST_FOLDER).glob("checkpoint-*.abandoned*"))
