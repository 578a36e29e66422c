"""Scores in the background: the reward of one batch is computed while the next is drawn.

Shapes: pixels [B, 3, (F,) H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from fewstep.evaluation.scorers.scorer import Scorer
from fewstep.evaluation.scorers.total import RewardParts, score_all


class PendingReward:
    """A batch that is being scored."""

    def __init__(self, future: Future[RewardParts]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> RewardParts:
        """The parts, once they are there; `timeout` in seconds.

        Raises what the scorer raised, or TimeoutError.
        """
        return self._future.result(timeout)


class OverlappedReward:
    """Scores batches one after the other in one thread, without gradient.

    One thread, so the scores do not depend on timing: batches are scored in the order in which they were submitted, on
    a copy of their pixels that later changes do not reach. A GPU scorer runs on the default stream of its device; a
    remote scorer leaves this process's devices alone. Use it as a context manager, or `close` it.
    """

    def __init__(self, scorers: Sequence[Scorer], *, chunk: int | None = None) -> None:
        self.scorers, self.chunk = tuple(scorers), chunk
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    def submit(self, pixels: Tensor, prompts: list[str]) -> PendingReward:
        """Start scoring. Raises RuntimeError after `close`."""
        copy = pixels.detach().clone()
        return PendingReward(self._executor.submit(score_all, self.scorers, copy, list(prompts), chunk=self.chunk))

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> OverlappedReward:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
