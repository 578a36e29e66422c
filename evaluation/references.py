"""What generated images are asked for and held against: prompts, and real pictures or their statistics.

Shapes: pixels [N, 3, H, W] in [0, 1], features [N, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.data import read_prompts
from fewstep.core.media.pictures import find_pictures, read_picture
from fewstep.evaluation.measures.features import Extractor, cache_folder, picture_features
from fewstep.evaluation.measures.statistics import FeatureStatistics
from fewstep.evaluation.systems import OwnReference

# Two halves of four pictures each have a kernel distance.
LEAST_PICTURES = 8
GRID_COLUMNS = 10
# At which real pictures are shown beside samples where their own size is larger.
SHOWN_SIDE = 256


class Classes(Protocol):
    """A classifier of what prompts ask for, and what it says of real pictures: their accuracy and their diversity."""

    @property
    def accuracy(self) -> float: ...
    @property
    def diversity(self) -> float: ...

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """The class [N] that each prompt asks for."""
        ...

    def right(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Whether each of the pixels [B, 3, H, W] is of its class: [B] of 1 and 0, float64."""
        ...


@dataclass(frozen=True)
class ReferenceFeatures:
    """Real pictures as one extractor sees them.

    `features` [M, D] are None where only statistics are known (an .npz file). `labels` [M] are the strata of a set with
    fixed counts per class. `floor_pool` are other real pictures, with their labels, which take the place of generated
    ones to measure the floor; without a second set it is one half of the folder, held against `floor_against`, the
    other.
    """

    name: str
    statistics: FeatureStatistics
    features: Tensor | None = None
    labels: Tensor | None = None
    floor_pool: Tensor | None = None
    floor_labels: Tensor | None = None
    floor_against: Tensor | None = None

    @classmethod
    def of_features(cls, name: str, features: Tensor, *, source: str, **others: Tensor | None) -> ReferenceFeatures:
        """From features [M, D] and, by name, the fields that follow them."""
        return cls(name, FeatureStatistics.from_features(features, source=source), features, **others)

    def floor_rows(self, samples: int, *, seed: int) -> Tensor | None:
        """Rows of the floor's pool: `samples` of them without replacement, classes in turn, or all where there are
        fewer; without labels always all. None where there is no pool.

        A draw that left classes to chance would make the floor too high, since prompts take turns as well.
        """
        if self.floor_pool is None:
            return None
        if self.floor_labels is None:
            return torch.arange(len(self.floor_pool))
        order = torch.randperm(len(self.floor_pool), generator=torch.Generator().manual_seed(seed))
        labels = self.floor_labels[order]
        turn = torch.zeros_like(labels)
        for label in labels.unique():
            mine = labels == label
            turn[mine] = torch.arange(int(mine.sum()))
        return order[turn.argsort(stable=True)[:samples]]


@dataclass(frozen=True)
class Reference:
    """Prompts, and the real pictures that the answers are compared with.

    Sample i draws prompt i modulo their number. `real` has what each extractor of `extractors` sees, by the same key.
    `grid_pixels` are real images [K, 3, H, W] to show above those of `grid_prompts`, None without pictures. `classes`
    None means that there is no classifier, so neither accuracy nor diversity.
    """

    name: str
    prompts: tuple[str, ...]
    grid_prompts: tuple[str, ...]
    grid_pixels: Tensor | None = None
    extractors: dict[str, Extractor] = field(default_factory=dict)
    real: dict[str, ReferenceFeatures] = field(default_factory=dict)
    classes: Classes | None = None

    def sample_prompts(self, samples: int) -> list[str]:
        """The prompts of samples 0 ... samples - 1."""
        return [self.prompts[index % len(self.prompts)] for index in range(samples)]


def own_reference(own: OwnReference, *, extractors: Mapping[str, Extractor], workers: int = 0) -> Reference:
    """The user's prompts and pictures, or the .npz statistics of pictures.

    The floor is the distance between even and odd rows of the folder. The first ten prompts and pictures are shown;
    they do not belong to each other. Features are kept in the cache of this user, since a reference serves many
    evaluations.

    Raises ValueError for missing or unreadable prompts and pictures, and for statistics that an extractor cannot use.
    """
    # Without prompts the first pictures of each folder are shown.
    prompts = ("",) * GRID_COLUMNS if own.prompts is None else read_prompts(own.prompts)
    common = {"prompts": prompts, "grid_prompts": prompts[:GRID_COLUMNS], "extractors": dict(extractors)}
    if own.images is None:
        return Reference("no reference", **common)
    name = Path(own.images).absolute().name
    if own.is_statistics():
        real = {
            key: ReferenceFeatures(name, FeatureStatistics.load(own.images, source=extractor.name))
            for key, extractor in extractors.items()
        }
        return Reference(name, real=real, **common)
    paths = find_pictures(own.images)
    if len(paths) < LEAST_PICTURES:
        raise ValueError(
            f"{own.images} holds {len(paths)} pictures; use at least {LEAST_PICTURES}, and thousands for figures that "
            "can be published"
        )
    size = (own.height, own.width) if own.cut else None
    real = {}
    for key, extractor in extractors.items():
        if size is None and not extractor.any_size:
            raise ValueError(f"{extractor.name} takes pictures of one size; give --reference_fit cut")
        features = picture_features(extractor, paths, size=size, cache=cache_folder(), workers=workers)
        halves = {"floor_pool": features[0::2], "floor_against": features[1::2]}
        real[key] = ReferenceFeatures.of_features(name, features, source=extractor.name, **halves)
    shown = [_shown(path, own) for path in paths[: min(GRID_COLUMNS, len(prompts))]]
    return Reference(name, real=real, grid_pixels=torch.stack(shown), **common)


def _shown(path: Path, own: OwnReference) -> Tensor:
    factor = min(1.0, SHOWN_SIDE / max(own.height, own.width))
    return read_picture(path, max(1, round(own.height * factor)), max(1, round(own.width * factor)))
