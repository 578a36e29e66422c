"""Data of a training as latents: `fewstep encode`, `fewstep pairs`, and what the scripts of that kind start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fewstep.core.data import LatentDataset

FORMATTER = argparse.ArgumentDefaultsHelpFormatter


def _parser(about: str, *, sized: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=FORMATTER)
    parser.add_argument("--teacher", required=True, help="diffusers directory or hub id")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    if sized:
        for side in ("--height", "--width"):
            parser.add_argument(side, type=int, required=True, help="pixels")
    return parser


def _write(output: str, make: Callable[[], LatentDataset], what: str) -> None:
    """Make the data and write them; what is wrong ends the process with a line."""
    if Path(output).exists() and not Path(output).is_dir():
        sys.exit(f"error: --output {output} is a file; name a folder")
    try:
        data = make()
        data.save(output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {len(data.prompts)} {what} to {output}")


def encode_images(about: str = "") -> None:
    """Encode a folder of pictures with captions, and end the process."""
    parser = _parser(about, sized=True)
    add = parser.add_argument
    add(
        "--images",
        required=True,
        help="folder with pictures and metadata.jsonl (file_name, text, and picture for "
        "models that edit: what it was before)",
    )
    add("--batch_size", type=int, default=16, help="pictures at a time")
    add("--told_picture", action="store_true", help="teacher.told_picture of the run")
    options = parser.parse_args()
    from fewstep.core.latent_sources import encode_image_folder
    from fewstep.core.settings import ModelSource
    from fewstep.core.teacher import Teacher
    from fewstep.core.teacher_files import check_teacher

    def make() -> LatentDataset:
        source = ModelSource(path=options.teacher, told_picture=options.told_picture)
        check_teacher(source)
        teacher = Teacher.load(source, device=options.device)
        size = {"height": options.height, "width": options.width}
        return encode_image_folder(teacher, options.images, batch_size=options.batch_size, **size)

    _write(options.output, make, "latents")


def encode_videos(about: str = "") -> None:
    """Encode a folder of videos with captions, and end the process."""
    parser = _parser(about, sized=True)
    add = parser.add_argument
    add("--videos", required=True, help="folder with videos and metadata.jsonl (file_name, text)")
    add("--frames", type=int, required=True, help="pixel frames of each video, 4 k + 1 for Wan")
    add("--every", type=int, default=1, help="take one of so many frames")
    options = parser.parse_args()
    from fewstep.core.latent_sources import encode_video_folder
    from fewstep.core.teacher import Teacher

    def make() -> LatentDataset:
        teacher = Teacher.load(options.teacher, device=options.device)
        size = {"frames": options.frames, "height": options.height, "width": options.width}
        return encode_video_folder(teacher, options.videos, every=options.every, **size)

    _write(options.output, make, "latents")


def make_pairs(about: str = "") -> None:
    """Write pairs of noise and teacher sample, and end the process."""
    parser = _parser(about, sized=False)
    add = parser.add_argument
    add("--prompts", required=True, help="text file, one prompt a line")
    add("--count", type=int, default=1000, help="pairs")
    add("--steps", type=int, default=50, help="of the teacher")
    add("--guidance", type=float, default=1.0, help="of the teacher")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch_size", type=int, default=64, help="pairs at a time")
    for side in ("height", "width", "frames"):
        add(f"--{side}", type=int, help="of the samples in pixels, None is the pipeline's own; data.* of the run")
    add("--pipeline", help="class of the pipeline; teacher.pipeline of the run")
    add("--embedded_guidance", type=float, help="what the network is told; teacher.embedded_guidance of the run")
    add("--guidance_low", type=float, help="of the expert of little noise; teacher.guidance_low of the run")
    add("--negative_prompt", help="what guidance leads away from; teacher.negative_prompt of the run")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="teacher.dtype of the run")
    add("--pictures", help="folder with a picture for each prompt, for teachers that are told one; data.pictures")
    add("--told_picture", action="store_true", help="teacher.told_picture of the run")
    options = parser.parse_args()
    import torch

    from fewstep.core.data import find_prompt_pictures, read_prompts
    from fewstep.core.latent_sources import PairSamples, teacher_pairs
    from fewstep.core.settings import TeacherConfig
    from fewstep.core.teacher import Teacher
    from fewstep.core.teacher_files import check_teacher

    def make() -> LatentDataset:
        prompts = read_prompts(options.prompts)
        pictures = find_prompt_pictures(options.pictures, prompts)
        names = ("pipeline", "embedded_guidance", "guidance_low", "negative_prompt", "dtype", "told_picture")
        told = {name: getattr(options, name) for name in names}
        settings = TeacherConfig(path=options.teacher, **told)
        check_teacher(settings)
        teacher = Teacher.of(settings, device=torch.device(options.device))
        kinds = {name: getattr(options, name) for name in ("count", "steps", "guidance", "seed", "batch_size")}
        sides = {name: getattr(options, name) for name in ("height", "width", "frames")}
        samples = PairSamples(**sides, pictures=pictures)
        return teacher_pairs(teacher, prompts, **kinds, samples=samples)

    _write(options.output, make, "pairs")
