"""Train the embedded video teacher and write it to assets/digits_video. About an hour on one shared core.

A run that is interrupted after the autoencoder goes on there when it is started again.
"""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="assets/digits_video", help="folder of the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--autoencoder_steps", type=int, default=None, help="fewer steps for a trial")
    parser.add_argument("--short_steps", type=int, default=None, help="fewer steps for a trial")
    parser.add_argument("--transformer_steps", type=int, default=None, help="fewer steps for a trial")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch

    from fewstep.embedded.moving_digits.teacher import VideoTeacherRecipe, save_video_teacher, train_video_teacher

    torch.set_num_threads(arguments.threads)
    names = ("autoencoder_steps", "short_steps", "transformer_steps")
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    recipe = VideoTeacherRecipe(seed=arguments.seed, **chosen)
    pipeline, dataset, log = train_video_teacher(recipe, arguments.output)
    save_video_teacher(pipeline, dataset, arguments.output, recipe=recipe, log=log)
    print(f"wrote {arguments.output}; measure it with scripts/evaluate_digits_video.py")


if __name__ == "__main__":
    main()
