"""What a slow scorer costs: seconds of a training step with the reward in the background and in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from studies.step_cost import timed
from torch import Tensor

from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.methods.table import build_method, needs_of
from fewstep.dmd.reward.scorers import load_scorers
from fewstep.dmd.reward.setup import RewardData, build_setup
from fewstep.dmd.reward.train import train_step
from fewstep.evaluation.scorers.scorer import Scorer, ScorerCard


class SlowScorer:
    """A scorer that answers `seconds` later, as one on another machine does: it leaves this CPU alone."""

    def __init__(self, scorer: Scorer, seconds: float) -> None:
        self.scorer, self.seconds = scorer, seconds

    @property
    def card(self) -> ScorerCard:
        return self.scorer.card

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        time.sleep(self.seconds)
        return self.scorer(pixels, prompts)


@dataclass(frozen=True)
class OverlapCost:
    """Median seconds of a step: with a scorer that answers at once, and with one that waits, in turn and overlapped.

    `hidden_share` is how much of the wait the overlap takes away.
    """

    method: str
    scorer_seconds: float
    slices: int
    quick_seconds: float
    in_turn_seconds: float
    overlapped_seconds: float
    hidden_share: float
    rounds: int


def measure_overlap(config: RewardRunConfig, *, seconds: float, rounds: int) -> OverlapCost:
    """Time single steps of the loop three ways, interleaved, after one step each of warm-up.

    Each slice of a step waits `seconds` for its scores. Raises ValueError for no round or no wait.
    """
    if rounds < 1 or seconds <= 0:
        raise ValueError(f"rounds is {rounds} and seconds {seconds}; time at least one round of a wait above 0")
    ways = ((0.0, True), (seconds, False), (seconds, True))
    with tempfile.TemporaryDirectory() as folder:
        steps = [StepTimer(config, Path(folder) / str(k), *way) for k, way in enumerate(ways)]
        taken = [[step() for step in steps] for _ in range(rounds + 1)][1:]
        for step in reversed(steps):
            step.close()
    quick, in_turn, overlapped = (statistics.median(row[k] for row in taken) for k in range(3))
    return OverlapCost(
        method=config.method,
        scorer_seconds=seconds,
        slices=config.run.gradient_accumulation,
        quick_seconds=quick,
        in_turn_seconds=in_turn,
        overlapped_seconds=overlapped,
        hidden_share=(in_turn - overlapped) / (in_turn - quick),
        rounds=rounds,
    )


class StepTimer:
    """A run whose single steps are timed; its scorers wait `seconds`, in the background or in turn."""

    def __init__(self, config: RewardRunConfig, directory: Path, seconds: float, overlap: bool) -> None:
        run = replace(config.run, directory=str(directory), resume=None)
        reward = replace(config.reward, overlap=overlap)
        config = replace(config, run=run, reward=reward)
        self.trainer = Trainer(run, RunDirectory(directory))
        loaded = load_scorers(reward.scorers, device=self.trainer.device)
        scorers = [SlowScorer(scorer, seconds) for scorer in loaded]
        needs = needs_of(config)
        setup = build_setup(config, needs, RewardData.read(config, needs), self.trainer, scorers=scorers)
        self.method = build_method(config, setup)

    def __call__(self) -> float:
        """Seconds of one step."""

        def step() -> None:
            train_step(self.method, self.trainer)
            self.trainer.advance()

        return timed(step, self.trainer.device)

    def close(self) -> None:
        self.method.setup.reward.close()
        self.trainer.close()
