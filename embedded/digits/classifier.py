"""A small classifier of 32x32 digits: class accuracy and the features of FID and KID for the embedded teacher.

Shapes: pixels [B, 3, 32, 32] in [0, 1], features [B, 64], logits [B, 10].
Run `python scripts/make_digits_judge.py classifier --output DIR` to train and save one.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.embedded.digits.images import load_digits_split

FEATURES = 64
WEIGHTS_FILE = "classifier.safetensors"
RECORD_FILE = "classifier.json"
BATCH = 64
LEARNING_RATE = 2e-3


class DigitsClassifier(nn.Module):
    """A convolutional network with smooth activations: pixels [B, 3, 32, 32] in [0, 1] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, stride=2),
            nn.GroupNorm(4, 16),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GroupNorm(8, 32),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
            nn.AvgPool2d(2),
        )
        self.embed = nn.Linear(64 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, 10)

    def features(self, pixels: Tensor) -> Tensor:
        """Penultimate features [B, 64]. Raises ValueError unless pixels are [B, 3, 32, 32]."""
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, 32, 32):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}; the digits classifier takes [B, 3, 32, 32] in [0, 1]: "
                "judge pipelines of other sizes with Inception features"
            )
        return F.silu(self.embed(self.trunk(2.0 * pixels - 1.0).flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


class DigitFeatures(nn.Module):
    """The classifier's features [B, 64] of pixels [B, 3, 32, 32] in [0, 1], for distances of sets of pictures."""

    num_features = FEATURES
    any_size = False
    name = "digits classifier, 64 features"

    def __init__(self, classifier: DigitsClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        parts = [tensor.detach().cpu().numpy().tobytes() for tensor in classifier.state_dict().values()]
        self.digest = hashlib.sha256(b"".join(parts)).hexdigest()

    def resize(self, pixels: Tensor) -> Tensor:
        """The same: the classifier knows pictures of its own size alone."""
        return pixels

    @torch.no_grad()
    def forward(self, resized: Tensor) -> Tensor:
        return self.classifier.features(resized)


@dataclass(frozen=True)
class TrainingRecord:
    """How a classifier was made. `losses` are mean cross-entropies per epoch; the accuracy is a fraction in [0, 1]."""

    seed: int
    epochs: int
    train_images: int
    test_images: int
    test_accuracy: float
    losses: tuple[float, ...]
    seconds: float
    torch_version: str
    command: str


def augment(pixels: Tensor, *, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10 degrees, scale by 8 %, shift by 2 pixels, change brightness by 10 %, add a little noise."""
    batch = pixels.shape[0]
    uniform = torch.rand(batch, 5, generator=generator) * 2.0 - 1.0
    angle, scale = uniform[:, 0] * math.radians(10.0), 1.0 + 0.08 * uniform[:, 1]
    shift = uniform[:, 2:4] * (2.0 * 2.0 / pixels.shape[-1])
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    warped = F.grid_sample(pixels, grid, align_corners=False)
    gain = (1.0 + 0.1 * uniform[:, 4]).view(batch, 1, 1, 1)
    return (warped * gain + 0.02 * torch.randn(pixels.shape, generator=generator)).clamp(0.0, 1.0)


@torch.no_grad()
def accuracy_on(classifier: DigitsClassifier, pixels: Tensor, *, labels: Tensor) -> float:
    """Fraction of pixels [N, 3, 32, 32] whose largest logit is the label [N]."""
    predicted = torch.cat([classifier(part).argmax(dim=1) for part in pixels.split(256)])
    return (predicted == labels).double().mean().item()


def train_classifier(
    seed: int = 0, epochs: int = 30, *, command: str = "", show_progress: bool = False
) -> tuple[DigitsClassifier, TrainingRecord]:
    """Train on the train split alone and measure the test accuracy once, at the end.

    A second, linear output learns the mean brightness of the image and is dropped afterwards, so that the features also
    see the stroke weight. The result depends on (seed, epochs) alone. Raises ValueError for less than one epoch.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; use at least 1")
    started = time.monotonic()
    train = load_digits_split("train")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier, ink_head = DigitsClassifier(), nn.Linear(FEATURES, 1)
    parameters = [*classifier.parameters(), *ink_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-2)
    count = len(train.labels)
    steps = epochs * math.ceil(count / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1)
    ink_mean, ink_std = train.pixels.mean(dim=(1, 2, 3)).mean(), train.pixels.mean(dim=(1, 2, 3)).std()
    losses = []
    for _ in tqdm(range(epochs), desc="digits classifier", unit="epoch", disable=not show_progress):
        total = 0.0
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            pixels = augment(train.pixels[rows], generator=generator)
            features = classifier.features(pixels)
            loss = F.cross_entropy(classifier.head(features), train.labels[rows], label_smoothing=0.05)
            ink = (pixels.mean(dim=(1, 2, 3)) - ink_mean) / ink_std
            optimizer.zero_grad()
            (loss + 0.3 * F.mse_loss(ink_head(features)[:, 0], ink)).backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        losses.append(total / count)
    classifier.requires_grad_(False).eval()
    test = load_digits_split("test")
    record = TrainingRecord(
        seed=seed,
        epochs=epochs,
        train_images=count,
        test_images=len(test.labels),
        test_accuracy=accuracy_on(classifier, test.pixels, labels=test.labels),
        losses=tuple(losses),
        seconds=round(time.monotonic() - started, 1),
        torch_version=torch.__version__,
        command=command,
    )
    return classifier, record


def save_classifier(
    classifier: nn.Module, record: TrainingRecord, *, path: str | Path, weights_file: str = WEIGHTS_FILE
) -> None:
    """Write weights (safetensors, under the name `weights_file`) and record (JSON) into the folder `path`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, folder / weights_file)
    (folder / RECORD_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="ascii")


def load_classifier(path: str | Path) -> DigitsClassifier:
    """The frozen classifier saved in the folder `path`. Raises ValueError when its weights are missing."""
    weights = Path(path) / WEIGHTS_FILE
    if not weights.is_file():
        raise ValueError(
            f"no classifier weights at {weights}; train them with "
            f"`python scripts/make_digits_judge.py classifier --output {Path(path)}`"
        )
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_file(weights))
    return classifier.requires_grad_(False).eval()
