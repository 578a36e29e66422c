"""Write a SANA-Sprint student with a ControlNet as a SanaControlNetPipeline, and a picture of what it draws."""

import argparse
import sys


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="run directory")
    add("--checkpoint", default="latest", help="latest, the name of a checkpoint of the run, or a path")
    add("--weights", choices=("ema", "live"), default="ema", help="moving average, or the weights of the last step")
    add("--output", required=True, help="directory to write")
    add("--steps", type=int, help="of the exported sampler; default: the run's")
    add("--control", help="folder of latents of pictures to follow, with prompts: draws the first ten")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from fewstep.core.data import LatentDataset
    from fewstep.core.export.check import ExportMismatchError
    from fewstep.core.export.sana_control import draw_control_grid, export_control_run

    chosen = {"steps": options.steps, "checkpoint": options.checkpoint, "weights": options.weights}
    try:
        call = export_control_run(options.run, options.output, **chosen)
        if options.control:
            data = LatentDataset.load(options.control)
            picture = f"{options.output}/samples.png"
            draw_control_grid(options.run, data.latents[:10], data.prompts[:10], picture, steps=(1, 2, 4))
            print(f"picture: {picture}")
    except (ValueError, FileExistsError, ExportMismatchError) as error:
        sys.exit(f"error: {error}")
    arguments = ", ".join(f"{name}={value}" for name, value in call.arguments().items())
    print(f"{options.output}: step {call.training_step}, call it with control_image=..., {arguments}")


if __name__ == "__main__":
    main()
