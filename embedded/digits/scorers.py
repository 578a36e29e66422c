"""Rewards of the embedded digits: is it the digit that was asked for, how much ink, how slanted. All differentiable.

Shapes: pixels [B, 3, H, W] in [0, 1], bright strokes on black; scores [B].
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.embedded.digits.classifier import load_classifier
from fewstep.embedded.digits.images import label_of_prompt
from fewstep.evaluation.scorers.scorer import ScorerCard

# Ink that every pixel has besides its own, so that a black picture has a slant (0) and a gradient. A digit has about
# 0.2 a pixel: its slant moves by less than 1e-4.
BACKGROUND_INK = 1e-6


class DigitLogProbability(nn.Module):
    """Log-probability, in nats, that a classifier gives to the digit of the prompt; 0 is certain.

    `classifier` maps pixels [B, 3, 32, 32] to logits [B, 10] and is frozen here. A prompt that names no digit, or
    several, raises ValueError.
    """

    def __init__(
        self, classifier: nn.Module, *, name: str = "digit_log_probability", weights: str | None = None
    ) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False).eval()
        self.card = ScorerCard(name, -math.inf, 0.0, differentiable=True, weights=weights)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        labels = torch.tensor([label_of_prompt(prompt) for prompt in prompts], device=pixels.device)
        return F.log_softmax(self.classifier(pixels), dim=1).gather(1, labels[:, None])[:, 0]


class StrokeWeight(nn.Module):
    """Ink of a picture: its mean brightness, in [0, 1]. Bold digits have more. Prompts are not read."""

    def __init__(self) -> None:
        super().__init__()
        self.card = ScorerCard("stroke_weight", 0.0, 1.0, differentiable=True)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return pixels.flatten(1).mean(dim=1)


class Slant(nn.Module):
    """How far the strokes lean to the right per pixel upwards: the shear that would make the picture upright.

    The ink is a mass in the plane, x to the right and y upwards; the slant is cov(x, y) / var(y), 0 for an upright
    shape and s for one whose rows were shifted by s * y. It does not change with place or brightness, and is not
    bounded. Prompts are not read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.card = ScorerCard("slant", differentiable=True)

    def forward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        mass = pixels.mean(dim=1) + BACKGROUND_INK  # [B, H, W]
        height, width = mass.shape[1:]
        x = torch.arange(width, dtype=mass.dtype, device=mass.device) - (width - 1) / 2.0
        y = (height - 1) / 2.0 - torch.arange(height, dtype=mass.dtype, device=mass.device)
        mass = mass / mass.sum(dim=(1, 2), keepdim=True)
        columns, rows = mass.sum(dim=1), mass.sum(dim=2)
        dx = x - (columns * x).sum(dim=1, keepdim=True)  # [B, W]
        dy = y - (rows * y).sum(dim=1, keepdim=True)  # [B, H]
        covariance = torch.einsum("bhw,bh,bw->b", mass, dy, dx)
        return covariance / (rows * dy.square()).sum(dim=1)


def load_digit_log_probability(folder: str | Path, *, device: str = "cpu") -> DigitLogProbability:
    """The reward of the classifier saved in a folder. Raises ValueError when its weights are missing."""
    return DigitLogProbability(load_classifier(folder), weights=str(folder)).to(device)
