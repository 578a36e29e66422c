"""A training log of the embedded models: averages per window, printed and kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tqdm import tqdm


@dataclass
class StepLog:
    """Collects scalars per step; every `every` steps their means become one record (with seconds since the start)."""

    name: str
    every: int = 100
    records: list[dict[str, float]] = field(default_factory=list)
    window: list[dict[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, step: int, **values: float) -> None:
        self.window.append(values)
        if (step + 1) % self.every:
            return
        means = {key: sum(row[key] for row in self.window) / len(self.window) for key in values}
        seconds = round(time.monotonic() - self.started, 1)
        self.records.append({"step": step + 1, "seconds": seconds, **means})
        self.window.clear()
        text = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
        tqdm.write(f"{self.name} step {step + 1}  {text}  {seconds:.0f} s")
