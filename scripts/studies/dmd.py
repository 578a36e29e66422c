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
# The guidance at which the teacher is shown; students inherit the guidance of their own settings.
GUIDANCE = "1.25"
TEACHER_STEPS, STUDENT_STEPS = (50, 8, 4, 2, 1), (1, 2, 4)
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
    """Judge the teacher at all its step counts beside all students, and write the report to `output`."""
    rows = [(f"teacher={TEACHER}", steps, GUIDANCE) for steps in TEACHER_STEPS]
    rows.insert(1, (f"teacher={TEACHER}", 50, "1"))
    for steps in STUDENT_STEPS:
        rows += [(f"student={run_directory(folder, steps, seed)}/export", steps, "1") for seed in seeds]
    pipelines = [f"--pipeline={name}" for name, _, _ in rows]
    calls = ["--steps", *(str(steps) for _, steps, _ in rows), "--guidance", *(scale for _, _, scale in rows)]
    curves = [f"--run={run_directory(folder, steps, seeds[0])}" for steps in STUDENT_STEPS]
    size = ["--samples", str(samples), "--batch_size", "125", "--timing_repeats", str(repeats)]
    show_and_run("scripts/evaluate_pipeline.py", *pipelines, *calls, *curves, *size, "--output", str(output))
    runs = [run_directory(folder, steps, seed) for steps in STUDENT_STEPS for seed in seeds]
    record_training(runs, output=output)


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
