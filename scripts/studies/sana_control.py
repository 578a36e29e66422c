"""A SANA teacher that follows edges: its ControlNet, trained on the embedded digits, and the latents of their edges.

The picture to follow is made from the data themselves: the strength of the edges of a digit, from which the digit is to
be drawn (the paper follows scribbles, arXiv:2503.09641, Sec. 4). Shapes: pixels [N, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.consistency.sana_sprint.teacher import FineTuneRecipe, train_flow_matching
from fewstep.core.data import LatentDataset, PromptsWithGuidance
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.sana_control import with_controlnet
from fewstep.core.teacher import Teacher
from fewstep.embedded.digits.images import load_digits_split

CONTROL_FOLDER = "control_latents"
# Weights of a central difference, smoothed across it (Sobel's filter).
SMOOTH, DIFFERENCE = (1.0, 2.0, 1.0), (-1.0, 0.0, 1.0)


def edge_pictures(pixels: Tensor) -> Tensor:
    """Strength of the edges of each picture, grey, its largest 1; a picture without edges is black.

    Raises:
        ValueError: the pixels are no picture batch of three channels.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be [N, 3, H, W], got shape {tuple(pixels.shape)}")
    grey = F.pad(pixels.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = torch.outer(grey.new_tensor(SMOOTH), grey.new_tensor(DIFFERENCE))
    slopes = F.conv2d(grey, torch.stack([across, across.T])[:, None])
    strength = slopes.square().sum(dim=1, keepdim=True).sqrt()
    largest = strength.amax(dim=(1, 2, 3), keepdim=True)
    return (strength / largest.clamp(min=torch.finfo(strength.dtype).tiny)).expand_as(pixels).contiguous()


def train_controlnet(
    teacher: Teacher, data: LatentDataset, control: Tensor, *, recipe: FineTuneRecipe, show_progress: bool = False
) -> list[float]:
    """Flow matching of the ControlNet of a teacher, whose transformer stays frozen; returns the losses.

    Args:
        teacher: of a pipeline from `with_controlnet`; changed in place.
        data: latents with prompts.
        control: latents of the pictures to follow, [N, C, h, w] like those of the data.
        recipe: length and rate.
        show_progress: show a bar.

    Raises:
        ValueError: the shapes differ. FloatingPointError: a loss is not finite.
    """
    if control.shape != data.latents.shape:
        raise ValueError(
            f"control is {tuple(control.shape)}, the data {tuple(data.latents.shape)}: give one for each of the data"
        )
    prompts = PromptsWithGuidance(
        teacher, data.prompts, cache=True, height=None, width=None, guidance=1.0, control=control
    )
    denoiser: Denoiser = teacher.denoiser
    network: Any = denoiser.network
    return train_flow_matching(
        denoiser, network.controlnet, data.latents, prompts=prompts, recipe=recipe, show_progress=show_progress
    )


def make_control_teacher(
    path: str | Path, latents: str | Path, output: str | Path, *, recipe: FineTuneRecipe, layers: int
) -> list[float]:
    """Train a ControlNet for the SANA teacher of the digits at `path`; write the pipeline and the latents of edges.

    `latents` are those of the training digits in their order, with prompts. Returns the losses.

    Raises:
        ValueError: see `with_controlnet` and `train_controlnet`. FileExistsError: `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists; give another directory")
    plain: Any = Teacher.load(path)
    teacher = Teacher(with_controlnet(plain.pipeline, layers=layers), path=str(path))
    data = LatentDataset.load(latents)
    with torch.no_grad():
        control = teacher.encode_pixels(edge_pictures(load_digits_split("train").pixels))
    losses = train_controlnet(teacher, data, control, recipe=recipe, show_progress=True)
    teacher.pipeline.save_pretrained(output, safe_serialization=True)
    LatentDataset(control, data.prompts).save(output / CONTROL_FOLDER)
    return losses
