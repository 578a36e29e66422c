"""Train the embedded teacher and write it to assets/digits_image. About 30 minutes on two cores."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="assets/digits_image", help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--autoencoder_steps", type=int, default=None, help="fewer steps for a trial")
    parser.add_argument("--transformer_steps", type=int, default=None, help="fewer steps for a trial")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch

    from fewstep.embedded.digits.teacher import TeacherRecipe, save_teacher, train_teacher

    torch.set_num_threads(arguments.threads)
    chosen = {
        name: getattr(arguments, name)
        for name in ("autoencoder_steps", "transformer_steps")
        if getattr(arguments, name) is not None
    }
    recipe = TeacherRecipe(seed=arguments.seed, **chosen)
    pipeline, log = train_teacher(recipe)
    save_teacher(pipeline, arguments.output, recipe=recipe, log=log)
    print(f"wrote {arguments.output}; measure it with scripts/evaluate_image.py")


if __name__ == "__main__":
    main()
