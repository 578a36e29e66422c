"""CLIP score: how well images fit their prompts, with open_clip weights on this machine. Nothing is downloaded.

Shapes: pixels [B, 3, H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG_FILE = "open_clip_config.json"


class ClipScorer(nn.Module):
    """100 times the cosine of CLIP image and text embeddings, never below 0 (arXiv:2104.08718, Eq. 1 with w = 100).

    Higher is better; the score is differentiable in the pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        # open_clip takes seconds to import, and most evaluations do without it.
        import open_clip

        super().__init__()
        # open_clip's models share no class that declares encode_image and encode_text.
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        preprocess = open_clip.get_model_preprocess_cfg(model)
        size = preprocess["size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] in [0, 100]. Raises ValueError unless there is one prompt per image."""
        if len(prompts) != len(pixels):
            raise ValueError(f"{len(prompts)} prompts for {len(pixels)} images; give one prompt per image")
        resized = F.interpolate(
            pixels.float(), size=self.image_size, mode="bicubic", align_corners=False, antialias=True
        ).clamp(0.0, 1.0)
        images = self.model.encode_image((resized - self.mean) / self.std, normalize=True)
        texts = self.model.encode_text(self.tokenizer(prompts).to(pixels.device), normalize=True)
        return 100.0 * (images * texts).sum(dim=-1).clamp(min=0.0)


def load_clip_scorer(weights: str | Path, *, model: str | None = None, device: str = "cpu") -> ClipScorer:
    """A scorer from local weights.

    `weights` is either a folder in open_clip's layout (open_clip_config.json beside a .safetensors file), or a
    .safetensors file of the architecture `model` (for instance "ViT-B-32").

    Raises:
        ValueError: weights or configuration are missing, are not safetensors, or the architecture is not named.
    """
    import open_clip

    place = Path(weights)
    if not place.exists():
        raise ValueError(f"no CLIP weights at {place}; download them and give the folder or the .safetensors file")
    if place.is_dir():
        if not (place / CONFIG_FILE).is_file() or not list(place.glob("*.safetensors")):
            raise ValueError(f"{place} must hold {CONFIG_FILE} and a .safetensors file, as open_clip saves them")
        name = f"local-dir:{place}"
        network = open_clip.create_model(name, device=device, require_pretrained=True)
    else:
        if place.suffix != ".safetensors":
            raise ValueError(f"{place.name} is not a .safetensors file; other formats can run code when opened")
        if model not in open_clip.list_models():
            raise ValueError(
                f"model is {model!r}; name the architecture of {place.name} as open_clip does, for instance 'ViT-B-32'"
            )
        name = str(model)
        network = open_clip.create_model(name, pretrained=str(place), device=device, require_pretrained=True)
    return ClipScorer(network, open_clip.get_tokenizer(name)).to(device)
