"""Distil the embedded teacher to 1, 2 and 4 steps, export, open the exports in diffusers, evaluate, write a report."""

import argparse
import shutil
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/demo", help="folder of runs and report, replaced if it exists")
    parser.add_argument("--training_steps", type=int, default=600, help="per student; the settings' own number is 1000")
    parser.add_argument("--samples", type=int, default=500, help="images per row of the table")
    options = parser.parse_args()

    from studies.dmd import STUDENT_STEPS, evaluate, run_directory, train_and_export

    started, output = time.monotonic(), Path(options.output)
    shutil.rmtree(output, ignore_errors=True)
    for steps in STUDENT_STEPS:
        train_and_export(output, steps, seed=0, changes=("--run.steps", str(options.training_steps)))
    evaluate(output, [0], samples=options.samples, repeats=3, output=output / "report")
    print(f"\ndemo done in {time.monotonic() - started:.0f} s; open {output / 'report' / 'report.html'}")
    print("\nuse a student as any diffusers pipeline:\n    from diffusers import DiffusionPipeline")
    print(f"    pipe = DiffusionPipeline.from_pretrained('{run_directory(output, 1, 0)}/export')")
    print("    pipe('the digit seven', num_inference_steps=1, guidance_scale=1).images[0].save('seven.png')")


if __name__ == "__main__":
    main()
