"""Write pairs of noise and teacher sample for the regression loss of DMD1."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="diffusers directory or hub id")
    parser.add_argument("--prompts", required=True, help="text file, one prompt a line")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from fewstep.core.data import read_prompts
    from fewstep.core.latent_sources import teacher_pairs
    from fewstep.core.teacher import Teacher

    prompts = read_prompts(arguments.prompts)
    teacher = Teacher.load(arguments.teacher, device=arguments.device)
    pairs = teacher_pairs(
        teacher,
        prompts,
        count=arguments.count,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    pairs.save(arguments.output)
    print(f"wrote {len(pairs.prompts)} pairs to {arguments.output}")


if __name__ == "__main__":
    main()
