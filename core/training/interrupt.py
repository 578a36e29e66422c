"""SIGTERM and SIGINT as a flag that a training loop reads between two steps."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_IMPATIENT_AFTER_SECONDS = 2.0


class Interrupt:
    """Remembers the first SIGTERM or SIGINT instead of ending the process.

    A terminal and a launcher may both deliver the same signal, so a repeated one does nothing, except that SIGINT two
    seconds after the first raises KeyboardInterrupt. Use it as a context manager, or with `install` and `restore`, on
    the main thread. `signum` is 0 until a signal comes.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._received = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def install(self) -> None:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)

    def restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == 0:
            self.signum, self._received = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self._received > _IMPATIENT_AFTER_SECONDS:
            raise KeyboardInterrupt
