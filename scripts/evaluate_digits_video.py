"""Judge a teacher of moving digits beside real clips: evaluate_digits_video.py --teacher assets/digits_video ..."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the pipeline, with its judges")
    parser.add_argument("--output", type=Path, required=True, help="folder for evaluation.json and samples.png")
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    from studies.clip_evaluation import evaluate_teacher

    command = shlex.join(["python", "scripts/evaluate_digits_video.py", *sys.argv[1:]])
    values = {name: getattr(options, name) for name in ("samples", "steps", "guidance", "seed")}
    print(evaluate_teacher(options.teacher, options.output, **values, command=command).result)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
