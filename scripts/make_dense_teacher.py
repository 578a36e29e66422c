"""Fine-tune a SANA teacher to dense time and normalised queries and keys, which SANA-Sprint needs (arXiv:2503.09641):
scripts/make_dense_teacher.py --teacher DIR --latents DIR --output DIR"""

from __future__ import annotations

import argparse
import sys


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="diffusers folder or hub name of a SANA pipeline")
    add("--latents", required=True, help="folder of latents with captions from scripts/encode_latents.py")
    add("--output", required=True, help="folder of the new pipeline, which must not exist")
    add("--steps", type=int, default=5000, help="updates; the paper takes 5000 for dense time at batch size 1024")
    add("--batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=2e-5)
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    from fewstep.consistency.sana_sprint.teacher import FineTuneRecipe, fine_tune_teacher
    from fewstep.core.data import LatentDataset

    try:
        recipe = FineTuneRecipe(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
        )
        data = LatentDataset.load(options.latents)
        losses = fine_tune_teacher(options.teacher, data, options.output, recipe=recipe, device=options.device)
    except (ValueError, FileExistsError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    shown = f", loss {losses[-1]:.4f} at the last step" if losses else ""
    print(f"wrote {options.output} after {len(losses)} updates{shown}; distil it with the section sana_sprint")


if __name__ == "__main__":
    main()
