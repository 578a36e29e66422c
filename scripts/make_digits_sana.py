"""Train the embedded SANA teacher and write it to assets/digits_sana. About 30 minutes of CPU time on one core."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="assets/digits_sana", help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--autoencoder_steps", type=int, default=None, help="fewer steps for a trial")
    parser.add_argument("--transformer_steps", type=int, default=None, help="fewer steps for a trial")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch

    from fewstep.embedded.digits.sana_teacher import SanaRecipe, save_sana, train_sana

    torch.set_num_threads(arguments.threads)
    chosen = {
        name: getattr(arguments, name)
        for name in ("autoencoder_steps", "transformer_steps")
        if getattr(arguments, name) is not None
    }
    recipe = SanaRecipe(seed=arguments.seed, **chosen)
    pipeline, log = train_sana(recipe)
    save_sana(pipeline, arguments.output, recipe=recipe, log=log)
    print(f"wrote {arguments.output}; measure it with scripts/evaluate_image.py")


if __name__ == "__main__":
    main()
