"""Distil the embedded teacher to 1, 2 and 4 steps, export, open the exports in diffusers, evaluate, write a report."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

TEACHER, GUIDANCE, TEACHER_STEPS = "assets/digits_image", "1.5", (50, 8, 4, 2, 1)
CONFIGS = ("digits_1step", "digits_2step", "digits_4step")


def show_and_run(*command: str) -> None:
    """Run one command of the demo, shown as one would type it; its failure ends the demo with its exit code."""
    print(f"\n$ {shlex.join(['python' if part == sys.executable else part for part in command])}", flush=True)
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", default="runs/demo", help="folder of the runs and the report, replaced if it exists"
    )
    parser.add_argument("--samples", type=int, default=500, help="images per row of the table")
    options = parser.parse_args()
    started, output, python = time.monotonic(), Path(options.output), sys.executable
    shutil.rmtree(output, ignore_errors=True)

    accelerate = (python, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")
    for name in CONFIGS:
        run = str(output / name)
        show_and_run(
            *accelerate, "scripts/train_dmd.py", "--config", f"configs/dmd/{name}.yaml", "--run.directory", run
        )
        show_and_run(python, "scripts/export_pipeline.py", "--run", run)

    teachers = [f"--pipeline=teacher={TEACHER}"] * len(TEACHER_STEPS)
    students = [f"--pipeline=student={output / name}/export" for name in CONFIGS]
    steps = [str(count) for count in (*TEACHER_STEPS, 1, 2, 4)]
    guidance = [GUIDANCE] * len(TEACHER_STEPS) + ["1"] * len(CONFIGS)
    runs = [f"--run={output / name}" for name in CONFIGS]
    evaluate = (
        python,
        "scripts/evaluate_pipeline.py",
        *teachers,
        *students,
        "--steps",
        *steps,
        "--guidance",
        *guidance,
    )
    report = ("--samples", str(options.samples), "--timing_repeats", "3", *runs, "--output", str(output / "report"))
    show_and_run(*evaluate, *report)
    print(f"\ndemo done in {time.monotonic() - started:.0f} s; open {output / 'report' / 'report.html'}")
    print("\nuse a student as any diffusers pipeline:\n    from diffusers import DiffusionPipeline")
    print(f"    pipe = DiffusionPipeline.from_pretrained('{output / CONFIGS[0]}/export')")
    print("    pipe('the digit seven', num_inference_steps=1, guidance_scale=1).images[0].save('seven.png')")


if __name__ == "__main__":
    main()
