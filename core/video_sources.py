"""Latents of a folder of videos.

A video is a folder of numbered pictures, or an animated GIF, PNG or WebP.

Shapes: N videos, pixels [N, 3, F, H, W] in [0, 1], latents [N, C, f, h, w].
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageSequence
from torch import Tensor
from tqdm import tqdm

from fewstep.core.data import LatentDataset
from fewstep.core.latent_sources import fit_picture, read_captions, read_picture
from fewstep.core.teacher import Teacher

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_video(path: Path, *, frames: int, height: int, width: int, every: int = 1) -> Tensor:
    """The first `frames` frames [3, frames, height, width] in [0, 1], one of `every`, resized and cut to the centre.

    Raises ValueError when the video is no readable animation or folder of pictures, or is too short.
    """
    if frames < 1 or every < 1:
        raise ValueError(f"frames is {frames} and every {every}; use at least 1")
    if path.is_dir():
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
        chosen = pictures[::every][:frames]
        _require_length(path, found=len(pictures), frames=frames, every=every)
        return torch.stack([read_picture(file, height, width) for file in chosen], dim=1)
    try:
        with Image.open(path) as animation:
            found = getattr(animation, "n_frames", 1)
            _require_length(path, found=found, frames=frames, every=every)
            taken = []
            for number, picture in enumerate(ImageSequence.Iterator(animation)):
                if number % every == 0 and len(taken) < frames:
                    taken.append(fit_picture(picture, height, width))
    except OSError as error:
        raise ValueError(
            f"{path} is no animation that PIL can read ({error}); write its frames as pictures into a folder, for "
            "instance with `ffmpeg -i video.mp4 -vf fps=16 folder/%05d.png`, and name the folder"
        ) from error
    return torch.stack(taken, dim=1)


def _require_length(path: Path, *, found: int, frames: int, every: int) -> None:
    needed = (frames - 1) * every + 1
    if found < needed:
        raise ValueError(f"{path} has {found} frames; {frames} frames, one of {every}, need {needed}")


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
    device = teacher.null_condition.tokens.device
    latents = []
    for path, _ in tqdm(rows, desc="video latents"):
        pixels = read_video(path, frames=frames, height=height, width=width, every=every)
        latents.append(teacher.encode_pixels(pixels[None].to(device)).float().cpu())
    return LatentDataset(torch.cat(latents), tuple(text for _, text in rows))
