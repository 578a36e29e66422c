"""Features of FD-DINOv2 and CMMD, from folders of weights on this machine. Nothing is downloaded.

Shapes: pixels [B, 3, H, W] in [0, 1], features [B, D].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# arXiv:2306.04675 uses ViT-L/14 at 224 pixels, arXiv:2401.09603 ViT-L/14 at 336; both are read off the folder.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_SIDE = 224


class Embedding(nn.Module):
    """A network behind a bicubic resize to a square and a normalisation; `answer` picks its features [B, D]."""

    any_size = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        answer: Callable[[Any], Tensor],
        *,
        name: str,
        digest: str,
        side: int,
        num_features: int,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    ) -> None:
        super().__init__()
        self.network, self.answer = network.requires_grad_(False).eval(), answer
        self.name, self.digest, self.side, self.num_features = name, digest, side, num_features
        for key, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1))

    @torch.no_grad()
    def resize(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] of any size as the network takes them."""
        size = (self.side, self.side)
        resized = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
        return (resized.clamp(0.0, 1.0) - self.mean) / self.std

    @torch.no_grad()
    def forward(self, resized: Tensor) -> Tensor:
        return self.answer(self.network(pixel_values=resized.to(next(self.network.parameters()).dtype))).float()


def load_dinov2(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Embedding:
    """The class token of DINOv2 (arXiv:2306.04675: FD-DINOv2), a folder such as facebook/dinov2-large of the hub.

    Raises ValueError when there is no such folder with safetensors of a Dinov2Model.
    """
    from transformers import Dinov2Model

    network: Any = load_network(Dinov2Model, folder, dtype=dtype)
    return Embedding(
        network,
        lambda found: found.last_hidden_state[:, 0],
        name=f"DINOv2, {network.config.hidden_size} features, bicubic to {DINO_SIDE}",
        digest=weights_digest(folder),
        side=DINO_SIDE,
        num_features=network.config.hidden_size,
        normalisation=(IMAGENET_MEAN, IMAGENET_STD),
    ).to(device)


def load_clip_vision(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Embedding:
    """Unit embeddings of CLIP's picture side for CMMD, a folder such as openai/clip-vit-large-patch14-336 of the hub.

    Raises ValueError when there is no such folder with safetensors of a CLIP.
    """
    from transformers import CLIPVisionModelWithProjection

    network: Any = load_network(CLIPVisionModelWithProjection, folder, dtype=dtype)
    side = network.config.image_size
    return Embedding(
        network,
        lambda found: F.normalize(found.image_embeds.float(), dim=-1),
        name=f"CLIP at {side} pixels, {network.config.projection_dim} features",
        digest=weights_digest(folder),
        side=side,
        num_features=network.config.projection_dim,
        normalisation=(CLIP_MEAN, CLIP_STD),
    ).to(device)


def load_network(kind: Any, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of transformers, every weight of which is in the folder. Raises ValueError when one is not."""
    place = Path(folder)
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise ValueError(
            f"{place} has no config.json and .safetensors of a {kind.__name__}; download them and give their folder"
        )
    try:
        network, notes = kind.from_pretrained(place, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{place} holds no {kind.__name__}: {error}") from error
    # A missing weight is filled with random numbers and a warning; figures of it would look like figures.
    missing = [name for name in notes["missing_keys"] if "position_ids" not in name]
    if missing:
        raise ValueError(f"{place} lacks {missing[0]} and {len(missing) - 1} more weights of a {kind.__name__}")
    return network


def weights_digest(folder: str | Path) -> str:
    """The digest of all .safetensors of a folder."""
    total = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
