"""The commands of the consistency study on the embedded teacher: train, export at several step counts, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewstep.dmd.digits_study import LAUNCH, TEACHER, record_training, show_and_run

METHODS = ("dcm", "ect", "scm", "rcm")
# All rows have guidance 1, which the students are trained with.
TEACHER_STEPS, STUDENT_STEPS = (50, 4, 2, 1), (1, 2, 4)


def run_directory(folder: Path, method: str, seed: int) -> Path:
    """Where the student of that method and seed is trained."""
    return folder / f"{method}_digits_seed{seed}"


def export_directory(folder: Path, method: str, seed: int, steps: int) -> Path:
    """Where its export for that many steps is."""
    return run_directory(folder, method, seed) / f"export_{steps}step"


def train_and_export(folder: Path, method: str, *, seed: int, changes: Sequence[str] = ()) -> None:
    """Train one student and export it for each step count; an interrupted run goes on, one that is exported is kept.

    `changes` are settings for the command line, such as ("--run.steps", "20").
    """
    run = run_directory(folder, method, seed)
    if (export_directory(folder, method, seed, STUDENT_STEPS[-1]) / "model_index.json").is_file():
        print(f"{run} is exported already")
        return
    resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
    config = f"configs/consistency/{method}_digits.yaml"
    where = ("--config", config, "--run.directory", str(run), "--run.seed", str(seed))
    show_and_run(*LAUNCH, "scripts/train_consistency.py", *where, *changes, *resume)
    for steps in STUDENT_STEPS:
        output = export_directory(folder, method, seed, steps)
        choice = ("--steps", str(steps), "--output", str(output), "--overwrite")
        show_and_run("scripts/export_pipeline.py", "--run", str(run), *choice)


def evaluate(folder: Path, methods: Sequence[str], seeds: Sequence[int], *, samples: int, output: Path) -> None:
    """Judge all students at all step counts beside the teacher without guidance; the report goes to `output`."""
    rows = [(f"teacher={TEACHER}", steps) for steps in TEACHER_STEPS]
    rows += [
        (f"{method}={export_directory(folder, method, seed, steps)}", steps)
        for method in methods
        for steps in STUDENT_STEPS
        for seed in seeds
    ]
    pipelines = [f"--pipeline={name}" for name, _ in rows]
    calls = ["--steps", *(str(steps) for _, steps in rows), "--guidance", *("1" for _ in rows)]
    curves = [f"--run={run_directory(folder, method, seeds[0])}" for method in methods]
    size = ["--samples", str(samples), "--batch_size", "125", "--timing_repeats", "1"]
    show_and_run("scripts/evaluate_pipeline.py", *pipelines, *calls, *curves, *size, "--output", str(output))
    record_training([run_directory(folder, method, seed) for method in methods for seed in seeds], output=output)
