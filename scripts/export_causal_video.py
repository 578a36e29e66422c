"""Write the student of a causal run as a streamable Wan pipeline: python scripts/export_causal_video.py --run runs/x"""

import argparse
import sys
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="run directory of scripts/train_causal_video.py")
    add("--checkpoint", default="latest", help="latest, the name of a checkpoint of the run, or a path")
    add("--weights", choices=("ema", "live"), default="ema", help="moving average, or the weights of the last step")
    add("--output", help="directory to write; default: export in the run directory")
    add("--steps", type=int, nargs="+", help="network calls of each chunk, such as 4 2; default: the run's")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the files")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add(
        "--far",
        metavar="DIR",
        help="also write it as diffusers' AnyFlowFARPipeline; for students of one call per chunk",
    )
    add("--device", default="cpu", help="cpu or cuda: where the export is compared with the rollout of the training")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # Imports are slow; --help and mistyped options answer without them.
    from fewstep.causal_video.export.card import streaming_snippet
    from fewstep.causal_video.export.far import export_far
    from fewstep.causal_video.export.pipeline import export_causal_run
    from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
    from fewstep.core.export.check import ExportMismatchError

    if options.far is not None and Path(options.far).exists():
        sys.exit(f"error: --far {options.far} exists; give another directory")
    try:
        directory, record = export_causal_run(
            options.run,
            options.output,
            checkpoint=options.checkpoint,
            weights=options.weights,
            steps=options.steps,
            dtype=options.dtype,
            overwrite=options.overwrite,
            device=options.device,
        )
        far = None if options.far is None else export_far(CausalVideoPipeline.from_pretrained(directory), options.far)
    except (ValueError, FileExistsError, ExportMismatchError) as error:
        sys.exit(f"error: {error}")
    if far is not None:
        print(f"{options.far}: AnyFlowFARPipeline, {far:.1e} of the largest latent from the stream")
    print(f"{directory}: {record.method}, step {record.training_step}\n")
    print(streaming_snippet(record, str(directory)), end="")


if __name__ == "__main__":
    main()
