"""Train a judge of the embedded digits: make_digits_judge.py classifier --output DIR (or held_out, or clips)"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

DEFAULTS = {"classifier": (0, 30), "held_out": (1, 60), "clips": (0, 700)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(DEFAULTS), help="of pictures, a second one of pictures, or of clips")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives weights and record")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--length", type=int, default=None, help="epochs over pictures, steps for clips")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from fewstep.embedded.digits.classifier import save_classifier, train_classifier
    from fewstep.embedded.digits.held_out_classifier import save_held_out, train_held_out
    from fewstep.embedded.moving_digits.judges import save_judges, train_judges

    seed, length = DEFAULTS[arguments.kind]
    seed = seed if arguments.seed is None else arguments.seed
    length = length if arguments.length is None else arguments.length
    command = shlex.join(["python", "scripts/make_digits_judge.py", *sys.argv[1:]])
    if arguments.kind == "clips":
        judges, found = train_judges(seed, length, command=command, show_progress=True)
        save_judges(judges, found, path=arguments.output)
        accuracy = f"digit {found.digit:.4f}, direction {found.direction:.4f}, speed {found.speed:.4f}"
        print(f"held-out accuracy: {accuracy} on {found.test_clips} clips, after {found.seconds} s")
        return
    if arguments.kind == "held_out":
        classifier, record = train_held_out(seed, length, command=command, show_progress=True)
        save_held_out(classifier, record, path=arguments.output)
    else:
        classifier, record = train_classifier(seed, length, command=command, show_progress=True)
        save_classifier(classifier, record, path=arguments.output)
    print(f"test accuracy {record.test_accuracy:.4f} on {record.test_images} images after {record.seconds} s")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
