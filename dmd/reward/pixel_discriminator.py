"""A discriminator on pixels: frozen features, trained heads (Flash-DMD, arXiv:2511.20549, stage 1).

Legend: B batch; pixels [B, 3, H, W] in [0, 1]; feature maps [B, C, N].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.core.data import REAL_SEED, LatentDataset, rows_of_samples
from fewstep.core.discriminator import DiscriminatorHeads
from fewstep.core.teacher import Teacher
from fewstep.dmd.gan_loss import discriminator_loss
from fewstep.dmd.reward.sections import PixelGanConfig
from fewstep.embedded.digits.classifier import WEIGHTS_FILE, DigitsClassifier, load_classifier
from fewstep.evaluation.scorers.preprocess import Preprocess
from fewstep.evaluation.scorers.weights import read_weights, require_files

# Of a vision model: the layers at these shares of its depth.
DEPTHS = (0.25, 0.5, 0.75, 1.0)


class PixelFeatures(Protocol):
    """A module that turns pixels into feature maps and can say how many channels each has."""

    @property
    def channels(self) -> tuple[int, ...]: ...

    def __call__(self, pixels: Tensor) -> list[Tensor]: ...


class DigitsFeatures(nn.Module):
    """The activations of the digits classifier's three convolutions, for pictures of any size from 8 x 8 on.

    Raises ValueError for a layer that is none of 0, 1, 2.
    """

    def __init__(self, classifier: DigitsClassifier, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.trunk = classifier.trunk
        widths = [layer.num_channels for layer in classifier.trunk if isinstance(layer, nn.GroupNorm)]
        self.layers = chosen_layers(layers, len(widths), default=range(len(widths)))
        self.channels = tuple(widths[layer] for layer in self.layers)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x, maps = 2.0 * pixels - 1.0, []
        for layer in self.trunk:
            x = layer(x)
            if isinstance(layer, nn.SiLU):
                maps.append(x.flatten(2))
        return [maps[layer] for layer in self.layers]


class VisionFeatures(nn.Module):
    """Hidden states of a vision transformer of transformers, which sees the pictures in its own size and scale.

    `network` takes `pixel_values` and answers with `hidden_states`, [B, N, C] or [B, h, w, C]. Raises ValueError for a
    layer that it does not have.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.network, self.preprocess = network, preprocess
        with torch.no_grad():
            states = self.states(torch.zeros(1, 3, *preprocess.size))
        depth = len(states) - 1
        self.layers = chosen_layers(layers, len(states), default=[round(share * depth) for share in DEPTHS])
        self.channels = tuple(states[layer].shape[1] for layer in self.layers)

    def states(self, pixels: Tensor) -> list[Tensor]:
        """All hidden states as [B, C, N]."""
        found = self.network(pixel_values=self.preprocess(pixels), output_hidden_states=True).hidden_states
        return [state.flatten(1, -2).transpose(1, 2) for state in found]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        states = self.states(pixels)
        return [states[layer] for layer in self.layers]


class PixelDiscriminator(nn.Module):
    """Logits [B] of pixels: the mean of one head per feature map; a large one says real. Only the heads are trained.

    The paper takes SAM's encoder for the features. Gradients pass through them to the pixels.
    """

    def __init__(self, features: PixelFeatures, *, width: int, seed: int) -> None:
        super().__init__()
        assert isinstance(features, nn.Module)
        self.features = features.requires_grad_(False).eval()
        self.heads = DiscriminatorHeads(features.channels, width=width, seed=seed)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.heads(self.features(pixels))


def chosen_layers(layers: Sequence[int], count: int, *, default: Sequence[int]) -> tuple[int, ...]:
    """The layers, or the default ones without repeats. Raises ValueError for one outside 0 ... count - 1."""
    if not layers:
        return tuple(dict.fromkeys(default))
    if not all(0 <= layer < count for layer in layers):
        raise ValueError(f"pixel_gan.layers is {tuple(layers)}; this network has layers 0 to {count - 1}")
    return tuple(layers)


def load_features(folder: str | Path, layers: Sequence[int] = ()) -> PixelFeatures:
    """The frozen features in a folder: the digits classifier, or a vision model of transformers in safetensors.

    Of a model with several parts (SAM, CLIP, SigLIP) its vision encoder is taken.

    Raises:
        ValueError: the folder holds neither, a file is missing, or a layer does not exist.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return DigitsFeatures(load_classifier(folder), layers)
    # Names a missing or pickled file before anything slow is imported.
    read_weights(folder, scorer="the pixel discriminator's backbone")
    require_files(folder, ("config.json", "preprocessor_config.json"), scorer="the pixel discriminator's backbone")
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    network: Any = getattr(model, "vision_encoder", None) or getattr(model, "vision_model", None) or model
    size = network.config.image_size
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    preprocess = Preprocess(
        (size, size) if isinstance(size, int) else tuple(size),
        fit="squash",
        mean=tuple(settings["image_mean"]),
        std=tuple(settings["image_std"]),
    )
    return VisionFeatures(network.eval(), preprocess, layers)


def build_discriminator(settings: PixelGanConfig, *, seed: int) -> PixelDiscriminator:
    """The discriminator of the settings. Raises ValueError as `load_features` does."""
    features = load_features(settings.backbone, settings.layers)
    return PixelDiscriminator(features, width=settings.head_width, seed=seed)


def discriminator_step(network: nn.Module, fake: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss on pixels of the student and as many real ones, in one call, and what to log."""
    fake_logits, real_logits = network(torch.cat([fake, real])).split(len(fake))
    loss = discriminator_loss(fake_logits, real_logits)
    gap = (real_logits.mean() - fake_logits.mean()).detach()
    return loss, {"discriminator_loss": loss.detach(), "discriminator_gap": gap}


@dataclass(frozen=True)
class RealPictures:
    """Real latents in an order of their own, decoded when they are needed.

    Decoded, and not the pictures themselves, so that the discriminator cannot tell students by the autoencoder.
    """

    dataset: LatentDataset
    seed: int

    @torch.no_grad()
    def pixels(self, samples: Sequence[int], teacher: Teacher, *, device: torch.device) -> Tensor:
        """Pixels [n, 3, H, W] for these sample numbers."""
        rows = rows_of_samples(samples, len(self.dataset.prompts), self.seed + REAL_SEED)
        return teacher.decode(self.dataset.latents[rows].to(device))
