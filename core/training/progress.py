"""Progress on the terminal: a bar with loss, s/step, memory and ETA, or plain lines when output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

import torch
from tqdm import tqdm


class Progress:
    """Shows where a run is; one process shows it, the others are given `enabled=False`."""

    def __init__(self, *, start: int, total: int, enabled: bool, device: torch.device) -> None:
        self._total, self._start, self._step = total, start, start
        self._device = device
        self._enabled = enabled
        self._started = time.monotonic()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def advance(self) -> None:
        self._step += 1
        if self._bar is not None:
            self._bar.update(1)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show the newest metrics; called when they are logged."""
        if not self._enabled:
            return
        shown = {name: f"{value:.4g}" for name, value in metrics.items() if "loss" in name}
        shown["mem"] = memory_text(self._device)
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        seconds = (time.monotonic() - self._started) / max(1, self._step - self._start)
        remaining = duration_text(seconds * (self._total - self._step))
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {self._step}/{self._total}  {text}  {seconds:.3g} s/step  ETA {remaining}", flush=True)

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr if self._bar is not None else sys.stdout)
            (sys.stderr if self._bar is not None else sys.stdout).flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def memory_text(device: torch.device) -> str:
    """Peak memory of the device, or of the process on a CPU, such as `3.2G`."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
    else:
        import resource  # not on every system, and only needed where there is no GPU

        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{used / 2**30:.2f}G"


def duration_text(seconds: float) -> str:
    """Seconds as `h:mm:ss`."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
