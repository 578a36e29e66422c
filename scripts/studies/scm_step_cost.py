"""What an sCM training step costs beside the network calls that the method needs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from studies.step_cost import StepCost, compare_in_turns

from fewstep.consistency.config import ConsistencyConfig
from fewstep.consistency.setup import ConsistencyData, ConsistencySetup, build_setup
from fewstep.consistency.tangents import total_derivative
from fewstep.consistency.train import train_step
from fewstep.core.training.run_directory import RunDirectory
from fewstep.core.training.trainer import Trainer


def scm_calls(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> Callable[[], None]:
    """A function that makes the network calls of one sCM step and nothing else.

    The teacher's guided forward, the student's forward with its tangent, its forward and backward. No times, noise,
    losses, optimizer or data.
    """
    batch = config.run.batch_size
    _, x, condition = setup.real.rows(range(batch), trainer.device)
    t = torch.full((batch,), 0.5, device=trainer.device)
    student = setup.student_role.module

    def run() -> None:
        with torch.no_grad():
            velocity = setup.teacher.velocity(x, t, condition, config.teacher.guidance)
        total_derivative(lambda x_t, time: student(x_t, time, condition), x, t, velocity, torch.ones_like(t))
        student(x, t, condition).backward(x)
        student.zero_grad(set_to_none=True)

    return run


def measure_scm_step(config: ConsistencyConfig, *, rounds: int) -> StepCost:
    """Time a step of the loop and its bare network calls in turns, after one round of warm-up.

    Raises ValueError for another method, or a tangent by differences, which needs other calls.
    """
    if config.scm is None or config.matching is not None or config.scm.tangent != "jvp":
        raise ValueError(
            f"the method is {config.method}; the step cost is that of scm without matching and with tangent 'jvp': "
            "give configs/digits/scm.yaml"
        )
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=replace(config.run, directory=folder, resume=None))
        trainer = Trainer(config.run, RunDirectory(Path(folder)))
        setup = build_setup(config, ConsistencyData.read(config), trainer)
        calls = scm_calls(config, setup, trainer)

        def cycle() -> None:
            metrics = train_step(config, setup, trainer)
            trainer.advance()
            trainer.log(metrics)

        cost = compare_in_turns(cycle, calls, trainer, rounds=rounds, steps=1, batch_size=config.run.batch_size)
        trainer.close()
    return cost
