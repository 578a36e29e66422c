"""Three seeds of 1-, 2- and 4-step students beside the teacher: the table in assets/benchmarks/digits_dmd.

Runs that are already exported are kept, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import subprocess
import sys
from pathlib import Path

TEACHER, GUIDANCE, TEACHER_STEPS, STEPS = "assets/digits_image", "1.25", (50, 8, 4, 2, 1), (1, 2, 4)


def run(*command: str) -> None:
    print(f"$ {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def train(steps: int, seed: int, folder: Path) -> None:
    """One training run and its export."""
    place = folder / f"{steps}step_seed{seed}"
    if (place / "export" / "model_index.json").is_file():
        return
    resume = ("--resume", "latest") if any(place.glob("checkpoint-*")) else ()
    chosen = (
        "--config",
        f"configs/dmd/digits_{steps}step.yaml",
        "--run.directory",
        str(place),
        "--run.seed",
        str(seed),
    )
    run("scripts/train_dmd.py", *chosen, *resume)
    run("scripts/export_pipeline.py", "--run", str(place))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/benchmark_digits", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=2000, help="images per row and seed")
    parser.add_argument("--output", default="assets/benchmarks/digits_dmd")
    options = parser.parse_args()

    folder = Path(options.runs)
    for seed in options.seeds:
        for steps in STEPS:
            train(steps, seed, folder)
    rows = [(f"teacher={TEACHER}", steps, GUIDANCE) for steps in TEACHER_STEPS]
    for steps in STEPS:
        rows += [(f"student={folder}/{steps}step_seed{seed}/export", steps, "1") for seed in options.seeds]
    pipelines = [f"--pipeline={name}" for name, _, _ in rows]
    calls = ["--steps", *(str(steps) for _, steps, _ in rows), "--guidance", *(scale for _, _, scale in rows)]
    curves = [f"--run={folder}/{steps}step_seed{options.seeds[0]}" for steps in STEPS]
    size = ["--samples", str(options.samples), "--batch_size", "250", "--output", options.output]
    run("scripts/evaluate_pipeline.py", *pipelines, *calls, *curves, *size)


if __name__ == "__main__":
    main()
