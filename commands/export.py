"""Students of runs as files: `fewstep export`, and what scripts/export_*.py start."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FORMATTER = argparse.ArgumentDefaultsHelpFormatter
DTYPES = ("float32", "float16", "bfloat16")


def _export_pipeline_options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=FORMATTER)
    add = parser.add_argument
    add("--run", required=True, help="run directory")
    add("--checkpoint", default="latest", help="latest, best, the name of a checkpoint of the run, or a path")
    add("--weights", choices=("ema", "live"), default="ema", help="moving average, or the weights of the last step")
    add("--output", help="directory to write; default: export in the run directory")
    add("--steps", type=int, help="of the exported sampler, for consistency students; default: the run's")
    add(
        "--sampler",
        choices=("sde", "ode"),
        help="ode: a seed decides all, of a student that re-noises; default: the run's",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of the files")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--lora_only", action="store_true", help="write the adapters alone, to be loaded on the teacher")
    add("--base_model", metavar="OWNER/NAME", help="of the hub, for the card; None: what teacher.path says")
    add("--comfyui", action="store_true", help="also the network in one file, with a workflow, where ComfyUI knows it")
    add("--device", default="cpu", help="cpu or cuda: where the export is compared with the training sampler")
    return parser.parse_args()


def export_pipeline(about: str = "") -> None:
    """Write the student of a run as a diffusers pipeline, and end the process."""
    options = _export_pipeline_options(about)
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
            sampler=options.sampler,
            device=options.device,
            files=ExportFiles(
                options.dtype, options.overwrite, options.lora_only, hub_id=options.base_model, comfyui=options.comfyui
            ),
        )
    except (ValueError, FileExistsError, ExportMismatchError) as error:
        sys.exit(f"error: {error}")
    arguments = ", ".join(f"{name}={value}" for name, value in record.call_arguments().items())
    print(f"{directory}: step {record.training_step}, call the pipeline with {arguments}\n")
    print(loading_snippet(record, str(directory)), end="")


def _export_causal_video_options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=FORMATTER)
    add = parser.add_argument
    add("--run", required=True, help="run directory of scripts/train_causal_video.py")
    add("--checkpoint", default="latest", help="latest, best, the name of a checkpoint of the run, or a path")
    add("--weights", choices=("ema", "live"), default="ema", help="moving average, or the weights of the last step")
    add("--output", help="directory to write; default: export in the run directory")
    add("--steps", type=int, nargs="+", help="network calls of each chunk, such as 4 2; default: the run's")
    add("--dtype", choices=DTYPES, default="float32", help="of the files")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add(
        "--far",
        metavar="DIR",
        help="also write it as diffusers' AnyFlowFARPipeline; for students of one call per chunk, or of two times",
    )
    add("--device", default="cpu", help="cpu or cuda: where the export is compared with the rollout of the training")
    return parser.parse_args()


def export_causal_video(about: str = "") -> None:
    """Write the student of a causal run as a streamable Wan pipeline, and end the process."""
    options = _export_causal_video_options(about)
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


def _export_network_folder_options(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=FORMATTER)
    add = parser.add_argument
    add("--run", required=True, help="run directory")
    add("--role", choices=("student", "student_live", "fake_score"), default="student", help="student: its average")
    add("--checkpoint", default="latest", help="latest, best, the name of a checkpoint of the run, or a path")
    add("--output", required=True, help="folder to create")
    add("--dtype", choices=DTYPES, default="float32", help="of the network's file")
    return parser.parse_args()


def export_network_folder(about: str = "") -> None:
    """Write a network of a run as a folder to start from, and end the process."""
    options = _export_network_folder_options(about)
    # Imports are slow; --help and mistyped options answer without them.
    import torch

    from fewstep.core.export.network import export_network

    chosen = {"role": options.role, "checkpoint": options.checkpoint, "dtype": getattr(torch, options.dtype)}
    try:
        folder = export_network(options.run, options.output, **chosen)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    key = "fake_score.path" if options.role == "fake_score" else "student.path"
    print(f"{folder}: for {key} of another run of the same teacher")
