"""What a training step costs beside the network calls that the method needs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fewstep.core.data import rows_of_samples
from fewstep.core.denoiser import guided_velocity
from fewstep.core.training.progress import memory_text
from fewstep.core.training.run_directory import RunDirectory, describe_environment
from fewstep.core.training.trainer import Trainer
from fewstep.dmd.config import DmdConfig
from fewstep.dmd.setup import DmdData, DmdSetup, build_setup
from fewstep.dmd.train import train_step


@dataclass(frozen=True)
class StepCost:
    """Seconds of one cycle (one student update with its fake-score updates), medians over interleaved rounds.

    `ratio` is the median over rounds of loop / calls, each pair timed back to back; `memory` the peak of the process.
    """

    loop_seconds: float
    calls_seconds: float
    ratio: float
    ratios: tuple[float, ...]
    steps_per_cycle: int
    batch_size: int
    memory: str
    environment: dict[str, object]


def network_calls(config: DmdConfig, setup: DmdSetup, trainer: Trainer) -> Callable[[], None]:
    """A function that makes the network calls of one cycle of a one-step student and nothing else.

    Per cycle of r steps: r student forwards, one of them with backward; one guided teacher forward and one fake-score
    forward; r fake-score forwards with backward. No losses, optimizers, noise or data.
    """
    batch = config.run.batch_size
    rows = rows_of_samples(range(batch), len(setup.prompts), config.run.seed)
    condition = setup.prompts.rows(rows)
    x = torch.randn(batch, *setup.latent_shape, device=trainer.device)
    t = torch.full((batch,), 0.5, device=trainer.device)
    student, fake = setup.student_role.module, setup.fake_score
    updates = config.fake_score.ratio

    def run() -> None:
        for number in range(updates):
            with torch.set_grad_enabled(number == 0):
                velocity = student(x, t, condition)
            if number == 0:
                with torch.no_grad():
                    fake(x, t, condition)
                    null = setup.teacher.null_condition
                    guided_velocity(setup.teacher.denoiser, x, t, condition, null, config.teacher.guidance)
                velocity.backward(x)
            fake(x, t, condition).velocity.backward(x)
        for module in (student, fake):
            module.zero_grad(set_to_none=True)

    return run


def measure_step_cost(config: DmdConfig, *, rounds: int) -> StepCost:
    """Time the loop and its bare network calls in turns, after one round of warm-up.

    Raises ValueError for a student of several steps, whose number of calls varies from step to step.
    """
    if config.student.steps != 1:
        raise ValueError(f"student.steps is {config.student.steps}; the step cost is measured with a one-step student")
    updates = config.fake_score.ratio
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, directory=folder, resume=None))
        trainer = Trainer(config.run, RunDirectory(Path(folder)))
        setup = build_setup(config, DmdData.read(config), trainer)
        calls = network_calls(config, setup, trainer)

        def cycle() -> None:
            for _ in range(updates):
                metrics = train_step(config, setup, trainer)
                trainer.advance()
                trainer.log(metrics)

        cost = compare_in_turns(cycle, calls, trainer, rounds=rounds, steps=updates, batch_size=config.run.batch_size)
        trainer.close()
    return cost


def compare_in_turns(
    cycle: Callable[[], None],
    calls: Callable[[], None],
    trainer: Trainer,
    *,
    rounds: int,
    steps: int,
    batch_size: int,
) -> StepCost:
    """Time a cycle of `steps` steps and its bare calls in turns, after one round of warm-up.

    Raises ValueError for no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; time at least one")
    pairs = [(timed(cycle, trainer.device), timed(calls, trainer.device)) for _ in range(rounds + 1)][1:]
    ratios = tuple(loop / alone for loop, alone in pairs)
    return StepCost(
        loop_seconds=statistics.median(loop for loop, _ in pairs),
        calls_seconds=statistics.median(alone for _, alone in pairs),
        ratio=statistics.median(ratios),
        ratios=ratios,
        steps_per_cycle=steps,
        batch_size=batch_size,
        memory=memory_text(trainer.device),
        environment=describe_environment(trainer.device, processes=1),
    )


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
