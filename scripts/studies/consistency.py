"""The commands of the consistency study on the embedded teachers: train, export at several step counts, evaluate.

Decoupled MeanFlow has no export; `two_time.py` draws its samples and judges them the same way. SANA-Sprint has a
teacher of its own, which has rows of its own, and guidance as an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.dmd import LAUNCH, TEACHER, judge_digits, record_training, show_and_run

METHODS = ("dcm", "ect", "scm", "rcm", "meanflow", "imf", "alphaflow", "dmf", "anyflow", "sana_sprint")
NOT_EXPORTED = ("dmf",)
# These rows have guidance 1, which the students are trained with.
TEACHER_STEPS, STUDENT_STEPS = (50, 4, 2, 1), (1, 2, 4)
# One method that re-noises between steps and one that does not, over more of them.
CURVES, CURVE_STEPS = ("scm", "anyflow"), (1, 2, 4, 8, 16, 32)
SPRINT, SPRINT_TEACHER, SPRINT_TEACHER_STEPS, SPRINT_GUIDANCE = "sana_sprint", "assets/digits_sana", (20, 4, 2, 1), 1.25
# SANA-Sprint with one of its two losses, and as many updates of the student; trained only when asked for by name.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "sana_sprint_scm": ("--sana_sprint.discriminator", "null", "--run.steps", "300"),
    "sana_sprint_ladd": ("--sana_sprint.consistency", "null"),
}


def steps_of(method: str) -> tuple[int, ...]:
    """The numbers of steps at which a method is shown."""
    return CURVE_STEPS if method in CURVES else STUDENT_STEPS


def teacher_steps(methods: Sequence[str]) -> tuple[int, ...]:
    """Those at which the teacher is shown beside them."""
    return tuple(sorted({*TEACHER_STEPS, *(steps for method in methods for steps in steps_of(method))}, reverse=True))


def run_directory(folder: Path, method: str, seed: int) -> Path:
    """Where the student of that method and seed is trained."""
    return folder / f"{method}_digits_seed{seed}"


def export_directory(folder: Path, method: str, seed: int, steps: int) -> Path:
    """Where its export for that many steps is."""
    return run_directory(folder, method, seed) / f"export_{steps}step"


def train_and_export(folder: Path, method: str, *, seed: int, changes: Sequence[str] = ()) -> None:
    """Train one student and export it for each step count that is missing; an interrupted run goes on.

    A run that has an export is trained already. `changes` are settings for the command line, such as
    ("--run.steps", "20"); those of an ablation come before.
    """
    run = run_directory(folder, method, seed)
    resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
    if not any(run.glob("export_*step/model_index.json")):
        config = f"configs/digits/{SPRINT if method in ABLATIONS else method}.yaml"
        where = ("--config", config, "--run.directory", str(run), "--run.seed", str(seed))
        show_and_run(*LAUNCH, "scripts/train_consistency.py", *where, *ABLATIONS.get(method, ()), *changes, *resume)
    for steps in () if method in NOT_EXPORTED else steps_of(method):
        output = export_directory(folder, method, seed, steps)
        if not (output / "model_index.json").is_file():
            choice = ("--steps", str(steps), "--output", str(output), "--overwrite")
            show_and_run("scripts/export_pipeline.py", "--run", str(run), *choice)


def evaluation_rows(folder: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int, float]]:
    """ "NAME=DIR", steps and guidance of each row: the teachers that these methods have, then the students."""
    exported = [method for method in methods if method not in NOT_EXPORTED]
    sprints = [method for method in exported if method == SPRINT or method in ABLATIONS]
    others = [method for method in exported if method not in sprints]
    rows = [(f"teacher={TEACHER}", steps, 1.0) for steps in teacher_steps(others)] if others else []
    if sprints:
        rows += [(f"teacher_sana={SPRINT_TEACHER}", steps, SPRINT_GUIDANCE) for steps in SPRINT_TEACHER_STEPS]
    return rows + [
        (
            f"{method}={export_directory(folder, method, seed, steps)}",
            steps,
            SPRINT_GUIDANCE if method in sprints else 1.0,
        )
        for method in exported
        for steps in steps_of(method)
        for seed in seeds
    ]


def evaluate(folder: Path, methods: Sequence[str], seeds: Sequence[int], *, samples: int, output: Path) -> None:
    """Judge all students that export beside their teachers; the report goes to `output`."""
    rows = [(name, steps, f"{scale:g}", "own") for name, steps, scale in evaluation_rows(folder, methods, seeds)]
    curves = [f"--run={run_directory(folder, method, seeds[0])}" for method in methods]
    size = ["--samples", str(samples), "--batch_size", "125", "--timing_repeats", "5"]
    judge_digits(rows, [*curves, *size], samples=folder / "samples", output=output)
    record_training([run_directory(folder, method, seed) for method in methods for seed in seeds], output=output)
