"""DMD of four steps against one, with and without a fake score that is told the exit.

    python scripts/studies/told_exit.py --output assets/benchmarks/digits_told_exit

The four-step student stops at each of its steps in a quarter of the updates: 2,400 of them are 600 of each exit, beside
the 1,000 of the one-step student.
Runs that have exports are not trained again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from studies.dmd import LAUNCH, TEACHER, judge_digits, record_training, show_and_run

# Name of a variant: its steps, and its settings beside those of the configuration.
LONG = ("--run.steps", "2400", "--run.sample_every", "600", "--run.checkpoint_every", "600")
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one_step": (1, ()),
    "four_steps": (4, LONG),
    "four_steps_told": (4, (*LONG, "--fake_score.told_exit", "true")),
}
# What the others are compared with, and the record of it.
BASELINES = {"one_step": "to_one_step", "four_steps": "to_four_steps"}


def run_of(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant}_seed{seed}"


def train(folder: Path, variant: str, seed: int) -> None:
    """Train one student and export it."""
    run, (steps, changes) = run_of(folder, variant, seed), VARIANTS[variant]
    if not (run / "export" / "model_index.json").is_file():
        resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
        config = f"configs/digits/dmd_{steps}step.yaml"
        where = ("--config", config, "--run.directory", str(run), "--run.seed", str(seed))
        show_and_run(*LAUNCH, "scripts/train_dmd.py", *where, *changes, *resume)
        show_and_run("scripts/export_pipeline.py", "--run", str(run))


def main() -> None:
    """Train what is missing, and judge all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default="runs/told_exit", help="folder of the training runs")
    parser.add_argument("--samples", type=int, default=2000, help="images per row and seed")
    parser.add_argument("--output", help="folder of the records; without it nothing is judged")
    options = parser.parse_args()
    folder = Path(options.runs)
    for seed in options.seeds:
        for variant in VARIANTS:
            train(folder, variant, seed)
    if options.output is None:
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    size = ["--samples", str(options.samples), "--batch_size", "125", "--timing_repeats", "0"]
    for baseline, file in BASELINES.items():
        # The first rows are the baseline: others are compared with it seed by seed.
        variants = [baseline, *(name for name in VARIANTS if name != baseline)]
        rows = [
            (f"{variant}={run_of(folder, variant, seed)}/export", VARIANTS[variant][0], "1", "own")
            for variant in variants
            for seed in options.seeds
        ]
        rows.append((f"teacher={TEACHER}", 50, "1", "own"))
        report = folder / file
        judge_digits(rows, size, samples=folder / "samples", output=report)
        shutil.copyfile(report / "report.json", output / f"{file}.json")
    record_training([run_of(folder, variant, seed) for variant in VARIANTS for seed in options.seeds], output=output)


if __name__ == "__main__":
    main()
