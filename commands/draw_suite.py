"""What `fewstep evaluate suite` does: pictures of GenEval, DPG-Bench or T2I-CompBench, in the folder of its judge."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def _options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("suite", help="geneval, dpg or t2i_compbench")
    add("--pipeline", required=True, metavar="DIR", help="diffusers folder or hub id")
    add("--prompts", required=True, help="evaluation_metadata.jsonl, the folder of .txt files, or a list of prompts")
    add("--output", required=True, help="folder of samples and of the benchmark's pictures")
    add("--count", type=int, help="pictures a prompt; None: what the benchmark asks for")
    add("--steps", type=int, help="None: distillation.json")
    add("--guidance", type=float, help="None: distillation.json")
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=16, help="images per call")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="None: as the weights are stored")
    return parser.parse_args()


def draw_suite(about: str = "") -> None:
    """Draw what is missing, by all processes, and write the folder. Ends the process with a message for bad input."""
    options = _options(about)
    try:
        from fewstep.evaluation.samples.suites import read_suite, write_suite
        from fewstep.evaluation.systems import find_pipeline, read_system

        suite = read_suite(options.suite, options.prompts, count=options.count)
        system = read_system(find_pipeline(options.pipeline), steps=options.steps, guidance=options.guidance)
        from fewstep.commands.evaluate_image import require_device, require_folder, this_process

        require_folder(options.output)
        require_device(options.device)
        from fewstep.evaluation.samples.pipelines import Sampling, draw_stores

        folder, count = Path(options.output), len(suite.asked)
        drawn = {"batch_size": options.batch_size, "device": options.device, "dtype": options.dtype}
        sampling = Sampling(folder / "store", count, (options.seed,), **drawn, **this_process())
        ((store,),) = draw_stores([system], suite.asked, sampling)
        if sampling.rank == 0:
            written = write_suite(suite, store, folder / suite.kind)
            print(f"{count} pictures of {len(suite.prompts)} prompts for {suite.kind}: {written}")
    except ValueError as error:
        sys.exit(f"error: {error}")
