"""sCM with and without a smoothed time, against dCM at as many calls, on the embedded teacher.

    python scripts/studies/smooth_tangent.py --output assets/benchmarks/digits_smooth

Controls: smoothing by rate, and a share of t = 1 on top. One update of sCM counts seven calls (teacher, forward mode as
three, forward and backward as three), one of dCM five. Runs that have exports are not trained again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from studies.dmd import LAUNCH, TEACHER, judge_digits, record_training, show_and_run

RAW = ("--scm.check_tangent", "false", "--scm.time_smoothing", "0")
SMOOTH, FAST = ("--scm.time_smoothing", "0.01"), ("--student.optimizer.learning_rate", "3e-4")
SLOW = ("--student.optimizer.learning_rate", "1e-4")
# Name of a variant: its configuration, and its settings.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dcm": ("dcm", ()),
    "scm_raw_slow": ("scm", (*RAW, *SLOW)),
    "scm_raw_fast": ("scm", (*RAW, *FAST)),
    "scm_smooth_slow": ("scm", (*SMOOTH, *SLOW)),
    "scm_smooth_fast": ("scm", (*SMOOTH, *FAST)),
    "scm_smooth_fast_noise": ("scm", (*SMOOTH, *FAST, "--scm.max_time_share", "0.05")),
}
STEPS = (1, 2, 4)
# What the others are compared with, and the records of it.
BASELINES = {"dcm": "{}_steps", "scm_raw_slow": "{}_steps_to_raw", "scm_raw_fast": "{}_steps_to_raw_fast"}


def run_of(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant}_seed{seed}"


def train(folder: Path, variant: str, seed: int) -> None:
    """Train one student and export it for each number of steps that is missing."""
    run, (config, changes) = run_of(folder, variant, seed), VARIANTS[variant]
    resume = ("--resume", "latest") if any(run.glob("checkpoint-*")) else ()
    if not any(run.glob("export_*/model_index.json")):
        where = ("--config", f"configs/digits/{config}.yaml", "--run.directory", str(run), "--run.seed", str(seed))
        clip = () if config == "dcm" else ("--student.optimizer.clip", "100")
        show_and_run(*LAUNCH, "scripts/train_consistency.py", *where, *changes, *clip, *resume)
    for steps in STEPS:
        output = run / f"export_{steps}step"
        if not (output / "model_index.json").is_file():
            choice = ("--steps", str(steps), "--output", str(output), "--overwrite")
            show_and_run("scripts/export_pipeline.py", "--run", str(run), *choice)


def main() -> None:
    """Train what is missing, and judge all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--runs", default="runs/smooth_tangent", help="folder of the training runs")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), choices=STEPS, help="that are judged")
    parser.add_argument("--samples", type=int, default=2000, help="images per row and seed")
    parser.add_argument("--output", help="folder of the records; without it nothing is judged")
    options = parser.parse_args()
    folder = Path(options.runs)
    for seed in options.seeds:
        for variant in options.variants:
            train(folder, variant, seed)
    if options.output is None:
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    size = ["--samples", str(options.samples), "--batch_size", "125", "--timing_repeats", "0"]
    for steps in options.steps:
        for baseline, file in BASELINES.items():
            # The first rows are the baseline: others are compared with it at as many steps, seed by seed.
            variants = [baseline, *(name for name in options.variants if name != baseline)]
            rows = [
                (f"{variant}={run_of(folder, variant, seed)}/export_{steps}step", steps, "1", "own")
                for variant in variants
                for seed in options.seeds
            ]
            rows.append((f"teacher={TEACHER}", 50, "1", "own"))
            report = folder / file.format(steps)
            judge_digits(rows, size, samples=folder / f"samples_{steps}", output=report)
            shutil.copyfile(report / "report.json", output / f"{file.format(steps)}.json")
    record_training(
        [run_of(folder, variant, seed) for variant in options.variants for seed in options.seeds], output=output
    )


if __name__ == "__main__":
    main()
