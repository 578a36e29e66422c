"""What generated images are asked for and held against: the embedded digits, or the user's own prompts and pictures.

Shapes: pixels [N, 3, H, W] in [0, 1], labels [N], features [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.core.data import read_prompts
from fewstep.core.embedded.digits import PHRASINGS, balanced_prompt, caption, load_digits_split
from fewstep.core.embedded.digits import label_of_prompt as digit_of_prompt
from fewstep.core.latent_sources import read_picture
from fewstep.evaluation.accuracy import AccuracyResult, DiversityResult, class_accuracy, within_class_diversity
from fewstep.evaluation.digits_classifier import DigitFeatures, DigitsClassifier
from fewstep.evaluation.fid import ReferenceFeatures, extract_features
from fewstep.evaluation.inception import InceptionFeatures
from fewstep.evaluation.systems import OwnReference

SPLITS = ("test", "train")
# After so many indices `balanced_prompt` repeats: 10 digits, 4 turns of the stroke weight, all phrasings.
DIGIT_PROMPTS = 40 * len(PHRASINGS)
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# The kernel distance of two halves needs four pictures in each.
LEAST_PICTURES = 8
GRID_COLUMNS = 10
READ_BATCH = 64


@dataclass(frozen=True)
class DigitClasses:
    """A classifier of digits, and what it says of the real ones: their accuracy and their diversity."""

    classifier: DigitsClassifier
    accuracy: float
    diversity: float

    def score(
        self, pixels: Tensor, features: Tensor, *, prompts: Sequence[str]
    ) -> tuple[AccuracyResult, DiversityResult]:
        """Scores of pixels [N, 3, 32, 32] and their features [N, D], which were drawn for `prompts`."""
        labels = torch.tensor([digit_of_prompt(prompt) for prompt in prompts])
        accuracy, per_class = class_accuracy(self.classifier, pixels, labels=labels)
        return (
            AccuracyResult(accuracy, len(pixels), self.accuracy, tuple(per_class)),
            DiversityResult(within_class_diversity(features, labels), self.diversity),
        )


@dataclass(frozen=True)
class Reference:
    """Prompts, and the real images that the answers are compared with.

    Sample i draws prompt i modulo their number. `grid_pixels` are real images [K, 3, H, W] to show above those of
    `grid_prompts`. `classes` None means that there is no classifier, so neither accuracy nor diversity.
    """

    prompts: tuple[str, ...]
    extractor: nn.Module
    real: ReferenceFeatures
    grid_prompts: tuple[str, ...]
    grid_pixels: Tensor
    classes: DigitClasses | None = None

    def sample_prompts(self, samples: int) -> list[str]:
        """The prompts of samples 0 ... samples - 1."""
        return [self.prompts[index % len(self.prompts)] for index in range(samples)]


def digits_reference(
    split: str, *, classifier: DigitsClassifier, extractor: DigitFeatures | InceptionFeatures
) -> Reference:
    """The digits of `split`, "test" or "train"; the other split measures the floor. Raises ValueError for another."""
    if split not in SPLITS:
        raise ValueError(f"reference is {split!r}; use one of {', '.join(SPLITS)}")
    real = load_digits_split("test" if split == "test" else "train")
    other = load_digits_split("train" if split == "test" else "test")
    rows = extract_features(extractor, real.pixels)
    accuracy, _ = class_accuracy(classifier, real.pixels, labels=real.labels)
    return Reference(
        prompts=tuple(balanced_prompt(index) for index in range(DIGIT_PROMPTS)),
        extractor=extractor,
        real=ReferenceFeatures(
            split=split,
            features=rows,
            floor_pool=extract_features(extractor, other.pixels),
            floor_labels=other.labels,
            feature_extractor=extractor.name,
        ),
        # One column per digit, without a stroke weight.
        grid_prompts=tuple(caption(digit, weight=None, phrasing=0) for digit in range(10)),
        grid_pixels=torch.stack([real.pixels[real.labels == digit][0] for digit in range(10)]),
        classes=DigitClasses(classifier, accuracy, within_class_diversity(rows, real.labels)),
    )


def list_pictures(folder: str | Path) -> list[Path]:
    """The .png, .jpg, .jpeg and .webp files of a folder, sorted by name; its sub-folders are not read.

    Raises ValueError when there is no such folder, or when it holds fewer pictures than two halves need.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"there is no directory {place}; give a folder of pictures")
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if len(found) < LEAST_PICTURES:
        raise ValueError(
            f"{place} holds {len(found)} pictures ({', '.join(PICTURE_SUFFIXES)}); use at least {LEAST_PICTURES}, and "
            "thousands for figures that can be published"
        )
    return found


def folder_reference(own: OwnReference, *, extractor: nn.Module) -> Reference:
    """The user's pictures and prompts; the floor is the distance between even and odd rows of the folder.

    `extractor` has a `name` and turns pixels [B, 3, H, W] into features [B, D]. The first ten prompts and pictures are
    shown; they do not belong to each other. Raises ValueError for missing or unreadable prompts and pictures.
    """
    prompts = read_prompts(own.prompts)
    paths = list_pictures(own.images)
    parts, shown = [], []
    for start in tqdm(range(0, len(paths), READ_BATCH), desc="reference pictures", unit="batch"):
        # Whole folders of large pictures do not fit into memory; their features do.
        pixels = torch.stack([read_picture(path, own.height, own.width) for path in paths[start : start + READ_BATCH]])
        parts.append(extract_features(extractor, pixels))
        if start == 0:
            shown.append(pixels[: min(GRID_COLUMNS, len(prompts))].clone())
    features = torch.cat(parts)
    return Reference(
        prompts=prompts,
        extractor=extractor,
        real=ReferenceFeatures(
            split=Path(own.images).absolute().name,
            features=features,
            floor_pool=features[0::2],
            floor_labels=None,
            feature_extractor=str(extractor.name),
            floor_against=features[1::2],
        ),
        grid_prompts=prompts[:GRID_COLUMNS],
        grid_pixels=torch.cat(shown),
    )
