"""Train a ControlNet that turns edges into digits for the embedded SANA teacher; about five minutes on one CPU core."""

from __future__ import annotations

import argparse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--teacher", default="assets/digits_sana", help="SANA pipeline with dense time")
    parser.add_argument("--latents", default="assets/digits_sana/train_latents", help="its training latents")
    parser.add_argument("--output", default="runs/digits_sana_control", help="folder of the pipeline and of the edges")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the ControlNet")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from studies.sana_control import make_control_teacher

    from fewstep.consistency.sana_sprint.teacher import FineTuneRecipe

    recipe = FineTuneRecipe(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        clip_norm=1.0,
        seed=arguments.seed,
    )
    losses = make_control_teacher(
        arguments.teacher, arguments.latents, arguments.output, recipe=recipe, layers=arguments.layers
    )
    shown = losses[:: max(1, len(losses) // 10)]
    print(f"wrote {arguments.output}; losses on the way: {', '.join(f'{loss:.3f}' for loss in shown)}")


if __name__ == "__main__":
    main()
