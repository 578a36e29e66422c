"""Write latents of digits that follow actions, with captions and actions, for steered students: python
scripts/make_digits_steered.py, then scripts/train_causal_video.py --config configs/digits_video/steered.yaml"""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", default="assets/digits_video", help="pipeline whose autoencoder encodes")
    parser.add_argument("--output", default="runs/digits_steered_data", help="folder to write")
    parser.add_argument("--count", type=int, default=1200, help="clips")
    parser.add_argument("--seed", type=int, default=0, help="of the clips")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="of the pictures of digits")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from studies.steered_clips import encode_steered_digits

    from fewstep.core.teacher import Teacher

    teacher = Teacher.load(arguments.teacher, device=arguments.device)
    dataset, controls = encode_steered_digits(
        teacher, count=arguments.count, seed=arguments.seed, split=arguments.split
    )
    dataset.save(arguments.output)
    path = controls.save(arguments.output)
    print(f"wrote {len(dataset.prompts)} latents and {path} with {', '.join(controls.names)}")


if __name__ == "__main__":
    main()
