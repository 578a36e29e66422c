"""The commands of the study on the embedded teacher: train, export, evaluate; used by the demo and the benchmark."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fewstep.core.training.run_directory import ENVIRONMENT_FILE, METRICS_FILE, read_metrics

TEACHER = "assets/digits_image"
# Students are distilled without guidance, so that teacher stands first and is the baseline; with this guidance it has
# more of its digits right.
GUIDANCE = "1.25"
TEACHER_STEPS, GUIDED_STEPS, STUDENT_STEPS = (50, 8, 4, 2, 1), (50, 8, 4), (1, 2, 4)
# The stock grid of so few steps ends at t = 0.001, which wastes its last call; these are the grids of the students.
TEACHER_GRIDS = ("1,0.75,0.5,0.25", "1,0.5")
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")


def run_directory(folder: Path, steps: int, seed: int) -> Path:
    """Where the student of that many steps and that seed is trained."""
    return folder / f"digits_{steps}step_seed{seed}"


def train_and_export(folder: Path, steps: int, *, seed: int, changes: Sequence[str] = ()) -> None:
    """Train one student and export it; a run that was interrupted goes on, one that is exported is kept.

    `changes` are settings for the command line, such as ("--run.steps", "600").
    """
    run = run_directory(folder, steps, seed)
    if (run / "export" / "model_index.json").is_file():
        print(f"{run} is exported already")
        return
    resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
    config = f"configs/digits/dmd_{steps}step.yaml"
    where = ("--config", config, "--run.directory", str(run), "--run.seed", str(seed))
    show_and_run(*LAUNCH, "scripts/train_dmd.py", *where, *changes, *resume)
    show_and_run("scripts/export_pipeline.py", "--run", str(run))


def evaluate(folder: Path, seeds: Sequence[int], *, samples: int, repeats: int, output: Path) -> None:
    """Judge the teacher at all its step counts beside all students, and write the report to `output`.

    Samples stay with the runs: they are many, and the report does not need them again.
    """
    teacher = f"teacher={TEACHER}"
    rows = [(teacher, steps, "1", "own") for steps in TEACHER_STEPS]
    rows += [(teacher, grid.count(",") + 1, "1", grid) for grid in TEACHER_GRIDS]
    rows += [(teacher, steps, GUIDANCE, "own") for steps in GUIDED_STEPS]
    for steps in STUDENT_STEPS:
        rows += [(f"student={run_directory(folder, steps, seed)}/export", steps, "1", "own") for seed in seeds]
    curves = [f"--run={run_directory(folder, steps, seeds[0])}" for steps in STUDENT_STEPS]
    size = ["--samples", str(samples), "--batch_size", "125", "--timing_repeats", str(repeats)]
    judge_digits(rows, [*curves, *size], samples=folder / "samples", output=output)
    runs = [run_directory(folder, steps, seed) for steps in STUDENT_STEPS for seed in seeds]
    record_training(runs, output=output)


def judge_digits(
    rows: Sequence[tuple[str, int, str, str]], more: Sequence[str], *, samples: Path, output: Path
) -> None:
    """Evaluate rows of ("NAME=DIR", steps, guidance, grid) against the test digits; the first is the baseline."""
    pipelines = [f"--pipeline={name}" for name, _, _, _ in rows]
    calls = ["--steps", *(str(steps) for _, steps, _, _ in rows), "--guidance", *(scale for _, _, scale, _ in rows)]
    if any(grid != "own" for _, _, _, grid in rows):
        calls += ["--grid", *(grid for _, _, _, grid in rows)]
    against = ["--reference", "digits", "--samples_folder", str(samples), "--output", str(output)]
    show_and_run("scripts/evaluate_image.py", *pipelines, *calls, *more, *against)


def record_training(runs: Sequence[Path], *, output: Path) -> None:
    """Write `training.json` into the report: steps, seconds and threads of each training run, from its own records."""
    found = {}
    for run in runs:
        environment = json.loads((run / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        done, seconds = 0, 0.0
        for record in read_metrics(run / METRICS_FILE):
            if "seconds_per_step" in record:
                seconds += record["seconds_per_step"] * (record["step"] - done)
                done = record["step"]
        found[run.name] = {"steps": done, "seconds": round(seconds, 1), "threads": environment["threads"]}
    (output / "training.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def show_and_run(*arguments: str) -> None:
    """Run `python arguments`, shown as one would type it; a failure ends this program with the same exit code."""
    shown = shlex.join(arguments).replace("-m accelerate.commands.launch", "accelerate launch")
    print(f"\n$ {shown if shown.startswith('accelerate') else f'python {shown}'}", flush=True)
    finished = subprocess.run([sys.executable, *arguments], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
