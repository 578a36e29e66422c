"""Write the student of a run as a diffusers pipeline: python scripts/export_pipeline.py --run runs/digits_1step"""

import argparse
import sys


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="run directory")
    add("--checkpoint", default="latest", help="latest, the name of a checkpoint of the run, or a path")
    add("--weights", choices=("ema", "live"), default="ema", help="moving average, or the weights of the last step")
    add("--output", help="directory to write; default: export in the run directory")
    add("--steps", type=int, help="of the exported sampler, for consistency students; default: the run's")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the files")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--lora_only", action="store_true", help="write the adapters alone, to be loaded on the teacher")
    add("--device", default="cpu", help="cpu or cuda: where the export is compared with the training sampler")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Imports are slow; --help and mistyped options answer without them.
    from fewstep.core.export.check import ExportMismatchError
    from fewstep.core.export.model_card import loading_snippet
    from fewstep.core.export.run import ExportFiles, export_run

    try:
        directory, record = export_run(
            options.run,
            checkpoint=options.checkpoint,
            weights=options.weights,
            output=options.output,
            steps=options.steps,
            device=options.device,
            files=ExportFiles(options.dtype, options.overwrite, options.lora_only),
        )
    except (ValueError, FileExistsError, ExportMismatchError) as error:
        sys.exit(f"error: {error}")
    arguments = ", ".join(f"{name}={value}" for name, value in record.call_arguments().items())
    print(f"{directory}: step {record.training_step}, call the pipeline with {arguments}\n")
    print(loading_snippet(record, str(directory)), end="")


if __name__ == "__main__":
    main()
