"""Where the numbers and the sample grids of a run are shown beside its own files, through accelerate's trackers.

metrics.jsonl and samples/ are always written; a tracker is a second view of them. None of them ever asks a question:
what is missing is an error before the run starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

PROJECT = "fewstep"
# Names by which services know a run, so that a resumed run goes on where it was.
NAMES_FILE = "trackers.json"
# wandb's own words for not talking to anybody.
WANDB_SILENT = ("offline", "disabled", "dryrun")


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker that is not installed, and for wandb without a key."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.trackers names {name}, which is not installed: pip install {name}, or leave it out")
    if "wandb" in names and os.environ.get("WANDB_MODE", "online") not in WANDB_SILENT:
        # It would ask for a key at the terminal, and a batch job would wait for ever.
        import wandb  # pyright: ignore[reportMissingImports]

        if not wandb.api.api_key:
            raise ValueError(
                "run.trackers names wandb, and it has no key: run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline"
            )


class Trackers:
    """The trackers of one run, started when there is something to show. Only the first process uses it.

    Raises ValueError as `require_trackers`.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        require_trackers(names)
        self.names, self.folder = tuple(names), folder
        self._started: list[GeneralTracker] | None = None
        self._purge_step: int | None = None

    def begin(self, step: int) -> None:
        """Start again after `step` steps: TensorBoard leaves out what came later."""
        self.close()
        self._purge_step = step + 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        for tracker in self._all():
            tracker.log(dict(values), step=step)

    def picture(self, step: int, file: Path) -> None:
        """Show the sample grid of a step."""
        for tracker in self._all():
            if isinstance(tracker, MLflowTracker):
                tracker.log_artifact(str(file), artifact_path="samples")
                continue
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            if isinstance(tracker, TrackioTracker):
                import trackio  # pyright: ignore[reportMissingImports]

                tracker.log({"samples": trackio.Image(pixels)}, step=step)
            elif isinstance(tracker, TensorBoardTracker):
                tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({"samples": [pixels]}, step=step)

    def close(self) -> None:
        """Flush and close what is open."""
        for tracker in self._started or []:
            tracker.finish()
        self._started = None

    def _all(self) -> list[GeneralTracker]:
        if self._started is None:
            # accelerate's trackers ask which process they are in.
            PartialState()
            self._started = [self._start(name) for name in self.names]
        return self._started

    def _start(self, name: str) -> GeneralTracker:
        title, known = self.folder.name, self._known_names()
        if name == "tensorboard":
            tracker: GeneralTracker = TensorBoardTracker(name, self.folder, purge_step=self._purge_step)
        elif name == "wandb":
            own = known.setdefault(name, secrets.token_hex(4))
            tracker = WandBTracker(PROJECT, name=title, id=own, resume="allow", dir=str(self.folder))
        elif name == "trackio":
            tracker = TrackioTracker(
                PROJECT, name=known.setdefault(name, f"{title}-{secrets.token_hex(2)}"), resume="allow"
            )
        else:
            place = str((self.folder / name).absolute())
            tracker = MLflowTracker(PROJECT, logging_dir=place, run_id=known.get(name), run_name=title)
        tracker.start()
        if isinstance(tracker, MLflowTracker):
            known[name] = tracker.active_run.info.run_id
        if known != self._known_names():
            (self.folder / NAMES_FILE).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        return tracker

    def _known_names(self) -> dict[str, str]:
        file = self.folder / NAMES_FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
