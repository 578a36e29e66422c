"""What generated images are asked for and held against, and the user's own prompts and pictures as that.

Shapes: pixels [N, 3, H, W] in [0, 1], features [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.core.data import read_prompts
from fewstep.core.latent_sources import read_picture
from fewstep.evaluation.accuracy import AccuracyResult, DiversityResult
from fewstep.evaluation.fid import ReferenceFeatures, extract_features
from fewstep.evaluation.systems import OwnReference

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# The kernel distance of two halves needs four pictures in each.
LEAST_PICTURES = 8
GRID_COLUMNS = 10
READ_BATCH = 64


class Classes(Protocol):
    """A classifier of what prompts ask for, and what it says of real pictures: their accuracy and their diversity."""

    @property
    def accuracy(self) -> float: ...
    @property
    def diversity(self) -> float: ...

    def score(
        self, pixels: Tensor, features: Tensor, *, prompts: Sequence[str]
    ) -> tuple[AccuracyResult, DiversityResult]:
        """Scores of pixels [N, 3, H, W] and their features [N, D], which were drawn for `prompts`."""
        ...


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
    classes: Classes | None = None

    def sample_prompts(self, samples: int) -> list[str]:
        """The prompts of samples 0 ... samples - 1."""
        return [self.prompts[index % len(self.prompts)] for index in range(samples)]


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
