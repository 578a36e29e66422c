"""Where latents come from: the teacher's own samples (pairs of noise and result), or a folder of pictures or videos.

Shapes: latents and noise [N, C, h, w], pixels [N, 3, H, W] in [0, 1]; of videos [N, C, f, h, w] and [N, 3, F, H, W].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from fewstep.core.data import LatentDataset, PromptConditions
from fewstep.core.media.pictures import read_picture, require_readable
from fewstep.core.media.videos import read_video
from fewstep.core.randomness import sample_noise
from fewstep.core.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class PairSamples:
    """Size of samples in pixels and pixel frames, where None is the pipeline's own and of `frames` also a picture; and
    the picture that each prompt is told with, for teachers that are told one."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    pictures: tuple[Path, ...] = ()


def teacher_pairs(
    teacher: Teacher,
    prompts: Sequence[str],
    *,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    batch_size: int = 64,
    samples: PairSamples | None = None,
) -> LatentDataset:
    """Noise and what the teacher's ODE makes of it, for the regression loss of DMD1 (arXiv:2311.18828, Sec. 3.3).

    Pair i has prompt i modulo their number, with its picture where the teacher is told one, and noise of (seed, i);
    `samples` None are of the pipeline's own size. Raises ValueError when count is below 1, for pictures that the
    teacher is not told or that are missing, and for a size that the teacher cannot make.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one pair is needed")
    samples = samples or PairSamples()
    pictures, sides = samples.pictures, {"height": samples.height, "width": samples.width, "frames": samples.frames}
    if teacher.family.takes_picture != bool(pictures):
        told = (
            "a picture with each prompt: give --pictures"
            if not pictures
            else "no picture: leave --pictures out, or give --told_picture"
        )
        raise ValueError(f"{teacher.path} is told {told}")
    conditions = PromptConditions(teacher, prompts, cache=False, pictures=pictures, **sides)
    shape = teacher.latent_shape(**sides)
    device = teacher.null_condition.device
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    noise, latents = [], []
    for start in tqdm(range(0, count, batch_size), desc="teacher pairs"):
        rows = range(start, min(start + batch_size, count))
        eps = sample_noise(seed, rows, shape, stream="teacher_pairs", device=device)
        condition = conditions.rows([row % len(prompts) for row in rows])
        noise.append(eps.cpu())
        latents.append(teacher.sample(eps, condition, steps=steps, guidance=guidance).cpu())
    shown = tuple(pictures[index % len(prompts)] for index in range(count)) if pictures else ()
    return LatentDataset(torch.cat(latents), tuple(chosen), torch.cat(noise), shown)


class Caption(NamedTuple):
    """A file with its caption and, of a picture that was edited, the one that it was before."""

    file: Path
    text: str
    picture: Path | None


def read_captions(folder: Path) -> list[Caption]:
    """Pictures and captions named by `metadata.jsonl`, one object a line with `file_name` and `text`; and `picture`.

    Line breaks and runs of spaces in a caption become one space. Raises ValueError that names the line when the file is
    missing, a line is no such object, a caption is blank, a picture is missing, or some lines name one to edit and some
    do not.
    """
    file = folder / "metadata.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} does not exist; write one line per picture: {{'file_name': ..., 'text': ...}}")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            file_name, text = folder / record["file_name"], " ".join(record["text"].split())
            # Null is what some writers have for none.
            before = None if record.get("picture") is None else folder / record["picture"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} line {number} must be a JSON object with file_name and text: {error!r}"
            ) from error
        if not text:
            raise ValueError(f"{file} line {number} has a blank caption; the embeddings of a real caption are needed")
        for named in (file_name, before):
            if named is not None and (not named.exists() or named == folder):
                raise ValueError(f"{file} line {number} names {named}, which does not exist")
        rows.append(Caption(file_name, text, before))
        if (before is None) != (rows[0].picture is None):
            raise ValueError(f"{file} line {number} differs from the first: all lines name a picture to edit, or none")
    if not rows:
        raise ValueError(f"{file} names no picture")
    return rows


@torch.no_grad()
def encode_image_folder(
    teacher: Teacher, folder: str | Path, *, height: int, width: int, batch_size: int = 16
) -> LatentDataset:
    """Latents of the pictures of a folder, resized to cover height x width (pixels) and cut to their centre.

    Raises ValueError when captions or pictures are missing or unreadable, or there are pictures to edit and the teacher
    edits none, or the other way round.
    """
    teacher.latent_shape(height, width)
    rows = read_captions(Path(folder))
    told = tuple(row.picture for row in rows if row.picture is not None)
    if bool(told) != (teacher.family.takes_picture and not teacher.family.makes_videos):
        need = (
            "is told none: leave picture out, or give --told_picture"
            if told
            else "is told one with each prompt: name it (picture)"
        )
        raise ValueError(f"{folder}/metadata.jsonl names {len(told)} pictures to edit, and {teacher.path} {need}")
    require_readable([*(row.file for row in rows), *told])
    device = teacher.null_condition.device
    latents = []
    for start in tqdm(range(0, len(rows), batch_size), desc="latents"):
        batch = rows[start : start + batch_size]
        pixels = torch.stack([read_picture(path, height, width) for path, *_ in batch]).to(device)
        latents.append(teacher.encode_pixels(pixels).float().cpu())
    return LatentDataset(torch.cat(latents), tuple(row.text for row in rows), pictures=told)


@torch.no_grad()
def encode_video_folder(
    teacher: Teacher, folder: str | Path, *, frames: int, height: int, width: int, every: int = 1
) -> LatentDataset:
    """Latents of the videos that `metadata.jsonl` of a folder names, with their captions; see `read_video`.

    Raises ValueError when captions or videos are missing, unreadable or too short, or the teacher makes no videos of
    that size.
    """
    teacher.latent_shape(height, width, frames=frames)
    rows = read_captions(Path(folder))
    device = teacher.null_condition.device
    latents = []
    for path, *_ in tqdm(rows, desc="video latents"):
        pixels = read_video(path, frames=frames, height=height, width=width, every=every)
        latents.append(teacher.encode_pixels(pixels[None].to(device)).float().cpu())
    return LatentDataset(torch.cat(latents), tuple(row.text for row in rows))
