"""A second judge of the embedded digits that no training sees: another architecture, seed and augmentation stream.

A student that is trained on `DigitLogProbability` may learn to please that classifier. Whether it still draws digits is
asked of this one, which shares the training split with it and nothing else.

Shapes: pixels [B, 3, 32, 32] in [0, 1], logits [B, 10].
Run `python scripts/make_digits_judge.py held_out --output DIR` to train and save one.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.embedded.digits.classifier import TrainingRecord, augment, save_classifier
from fewstep.embedded.digits.images import load_digits_split
from fewstep.embedded.digits.scorers import DigitLogProbability

WEIGHTS_FILE = "held_out_classifier.safetensors"
WIDTH, PATCH, BLOCKS = 64, 4, 3
BATCH, LEARNING_RATE = 64, 2e-3


class MixerBlock(nn.Module):
    """Mixes between the patches, then between the channels of a patch (arXiv:2105.01601, Fig. 1): [B, N, D] to same."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm_patches, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.patches(self.norm_patches(tokens).transpose(1, 2)).transpose(1, 2)
        return tokens + self.channels(self.norm_channels(tokens))


class HeldOutClassifier(nn.Module):
    """An MLP-Mixer on patches of 4 x 4 pixels, where the training classifier is convolutional."""

    def __init__(self) -> None:
        super().__init__()
        patches = (32 // PATCH) ** 2
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.Sequential(*[MixerBlock(patches, WIDTH) for _ in range(BLOCKS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, 10]. Raises ValueError unless pixels are [B, 3, 32, 32]."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, 32, 32):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; the held-out classifier takes [B, 3, 32, 32]")
        tokens = self.embed(2.0 * pixels - 1.0).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def train_held_out(
    seed: int = 1, epochs: int = 60, *, command: str = "", show_progress: bool = False
) -> tuple[HeldOutClassifier, TrainingRecord]:
    """Train on the train split alone and measure the test accuracy once, at the end.

    The result depends on (seed, epochs) alone. Raises ValueError for less than one epoch.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; use at least 1")
    started = time.monotonic()
    train, test = load_digits_split("train"), load_digits_split("test")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = HeldOutClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=5e-2)
    count = len(train.labels)
    steps = epochs * math.ceil(count / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in tqdm(range(epochs), desc="held-out classifier", unit="epoch", disable=not show_progress):
        total = 0.0
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            logits = classifier(augment(train.pixels[rows], generator=generator))
            loss = F.cross_entropy(logits, train.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / count)
    classifier.requires_grad_(False).eval()
    record = TrainingRecord(
        seed=seed,
        epochs=epochs,
        train_images=count,
        test_images=len(test.labels),
        test_accuracy=(classifier(test.pixels).argmax(dim=1) == test.labels).double().mean().item(),
        losses=tuple(losses),
        seconds=round(time.monotonic() - started, 1),
        torch_version=torch.__version__,
        command=command,
    )
    return classifier, record


def save_held_out(classifier: HeldOutClassifier, record: TrainingRecord, *, path: str | Path) -> None:
    """Write weights (safetensors) and record (JSON) into the folder `path`."""
    save_classifier(classifier, record, path=path, weights_file=WEIGHTS_FILE)


def load_held_out(path: str | Path, *, device: str = "cpu") -> DigitLogProbability:
    """The held-out judge of the folder `path` as a scorer. Raises ValueError when its weights are missing."""
    weights = Path(path) / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(
            f"no held-out classifier at {weights}; train it with "
            f"`python scripts/make_digits_judge.py held_out --output {Path(path)}`"
        )
    classifier = HeldOutClassifier()
    classifier.load_state_dict(load_file(weights))
    return DigitLogProbability(classifier, name="held_out_log_probability", weights=str(path)).to(device)
