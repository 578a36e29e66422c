"""Write a network of a run into a copy of its model's folder, for student.path or fake_score.path of another run."""

import argparse
import sys


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="run directory")
    add("--role", choices=("student", "student_live", "fake_score"), default="student", help="student: its average")
    add("--checkpoint", default="latest", help="latest, the name of a checkpoint of the run, or a path")
    add("--output", required=True, help="folder to create")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the network's file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Imports are slow; --help and mistyped options answer without them.
    import torch

    from fewstep.core.export.network import export_network

    chosen = {"role": options.role, "checkpoint": options.checkpoint, "dtype": getattr(torch, options.dtype)}
    try:
        folder = export_network(options.run, options.output, **chosen)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    key = "fake_score.path" if options.role == "fake_score" else "student.path"
    print(f"{folder}: for {key} of another run of the same teacher")


if __name__ == "__main__":
    main()
