"""Features of clips for a Frechet video distance, from a folder of VideoMAE on this machine.

The first FVD (arXiv:1812.01717) takes I3D, whose published file is a program; arXiv:2404.12391 shows that VideoMAE's
features see motion where I3D's see frames alone. Figures of different features do not compare: the name says which.

Shapes: clips [B, 3, T, H, W] in [0, 1], features [B, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.core.media.videos import iterate_frames
from fewstep.evaluation.measures.embeddings import IMAGENET_MEAN, IMAGENET_STD, load_network, weights_digest


class ClipFeatures(nn.Module):
    """Mean tokens [B, D] of a VideoMAE, of `frames` evenly spaced frames resized to its square."""

    def __init__(self, network: Any, *, digest: str) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.frames, self.side = network.config.num_frames, network.config.image_size
        self.digest = digest
        self.name = f"VideoMAE, {network.config.hidden_size} features, {self.frames} frames of {self.side} pixels"

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        places = torch.linspace(0, clips.shape[2] - 1, self.frames).round().long()
        frames = clips[:, :, places].transpose(1, 2)
        flat = F.interpolate(
            frames.flatten(0, 1).float(), size=(self.side, self.side), mode="bicubic", antialias=True
        ).clamp(0.0, 1.0)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(flat) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = ((flat - mean) / std).unflatten(0, (len(clips), self.frames))
        dtype = next(self.network.parameters()).dtype
        return self.network(pixel_values=pixels.to(dtype)).last_hidden_state.mean(dim=1).float()


def load_videomae(folder: str | Path, *, device: str = "cpu") -> ClipFeatures:
    """From a folder such as MCG-NJU/videomae-base of the hub. Raises ValueError when it holds no whole VideoMAE."""
    from transformers import VideoMAEModel

    return ClipFeatures(load_network(VideoMAEModel, folder), digest=weights_digest(folder)).to(device)


def clip_features(extractor: ClipFeatures, files: Sequence[Path], *, frames: int) -> Tensor:
    """Features [N, D] of the first `frames` frames of each video. Raises ValueError for shorter ones."""
    device = next(extractor.parameters()).device
    found = []
    for file in files:
        clip = first_frames(file, frames)
        found.append(extractor(clip[None].to(device)).cpu())
    return torch.cat(found)


def first_frames(file: Path, frames: int) -> Tensor:
    """[3, frames, H, W] in [0, 1] at the video's own size. Raises ValueError for a shorter video."""
    from torchvision.transforms.functional import pil_to_tensor

    taken = []
    for picture in iterate_frames(file):
        taken.append(pil_to_tensor(picture))
        if len(taken) == frames:
            return torch.stack(taken, dim=1).float() / 255.0
    raise ValueError(f"{file} has {len(taken)} frames, and {frames} are compared")
