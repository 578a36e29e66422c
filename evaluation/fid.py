"""Frechet and kernel Inception distance, with the sample count, the seed and the floor beside each figure.

Shapes: N images, features [N, D] float64, mean [D], covariance [D, D].
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

KID_SUBSETS = 50
KID_SUBSET_SIZE = 1000
# Eigenvalues of a product of covariances are never negative; rounding moves zeros by about 1e-16 of the largest one.
NEGATIVE_TOLERANCE = 1e-8


@dataclass(frozen=True)
class FidResult:
    """A Frechet distance and what it takes to read it.

    `floor` is the same distance for `floor_samples` real images of the other split in place of the generated ones: the
    finite sample alone gives this much, and no generator is expected to score clearly lower. Where the real images have
    no second split, it is the distance between their two halves, which have fewer images and so a higher floor.
    """

    value: float
    samples: int
    reference_samples: int
    reference_split: str
    floor: float
    floor_samples: int
    feature_extractor: str
    seed: int


@dataclass(frozen=True)
class KidResult:
    """A kernel distance: mean over `subsets` random subsets of `subset_size` images, `spread` their standard deviation.

    The estimator is unbiased, so values near zero may be negative.
    """

    value: float
    spread: float
    subsets: int
    subset_size: int
    samples: int
    reference_samples: int
    reference_split: str
    floor: float
    feature_extractor: str
    seed: int


class FeatureRows(nn.Module):
    """Hands features [N, D] through, so that torchmetrics can work on features that were extracted once."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def extract_features(
    extractor: nn.Module, pixels: Tensor, *, batch_size: int = 64, show_progress: bool = False
) -> Tensor:
    """Features [N, D] in float64 of pixels [N, 3, H, W] in [0, 1].

    Raises ValueError for an empty set, another shape or range, and features that are not finite.
    """
    if pixels.ndim != 4 or pixels.shape[0] < 1 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}; features need [N, 3, H, W] with N >= 1")
    if pixels.min() < 0.0 or pixels.max() > 1.0:
        raise ValueError(f"pixels lie in [{pixels.min():.3g}, {pixels.max():.3g}]; features need [0, 1]")
    with torch.no_grad():
        parts = tqdm(pixels.split(batch_size), desc="features", unit="batch", disable=not show_progress)
        features = torch.cat([extractor(part).double().cpu() for part in parts])
    if not features.isfinite().all():
        raise ValueError("features are not finite: the generated pixels or the weights of the extractor are broken")
    return features


def _require_features(features: Tensor, *, name: str, least: int = 2) -> None:
    if features.ndim != 2 or features.shape[0] < least:
        raise ValueError(f"{name} features have shape {tuple(features.shape)}; use [N, D] with N >= {least}")


def frechet_inception_distance(generated: Tensor, reference: Tensor) -> float:
    """Frechet distance of features [N, D] and [M, D] through torchmetrics in float64 (arXiv:1706.08500, Eq. 6)."""
    _require_features(generated, name="generated")
    _require_features(reference, name="reference")
    metric = FrechetInceptionDistance(feature=FeatureRows(generated.shape[1]), normalize=True)
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def kernel_inception_distance(
    generated: Tensor, reference: Tensor, *, subsets: int = KID_SUBSETS, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of the polynomial kernel distance (arXiv:1801.01401, section 4).

    `subset_size` None means 1000, or half of the smaller set where that is less. The subsets depend on `seed` alone.
    """
    _require_features(generated, name="generated", least=4)
    _require_features(reference, name="reference", least=4)
    size = kid_subset_size(len(generated), len(reference)) if subset_size is None else subset_size
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # torchmetrics warns that it keeps all features, which are in memory already.
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*", category=UserWarning)
        metric = KernelInceptionDistance(
            feature=FeatureRows(generated.shape[1]), subsets=subsets, subset_size=size, normalize=True
        )
        metric.update(reference.double(), real=True)
        metric.update(generated.double(), real=False)
        # torchmetrics draws the subsets from the global generator.
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return mean.item(), spread.item()


def kid_subset_size(generated: int, reference: int) -> int:
    """Images per subset: 1000, or half of the smaller set, so that subsets differ from each other."""
    return min(KID_SUBSET_SIZE, min(generated, reference) // 2)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of N(mean1, cov1) and N(mean2, cov2) in float64 (arXiv:1706.08500, Eq. 6).

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1^(1/2) cov2 cov1^(1/2))^(1/2)), means [D], covariances [D, D].
    Raises ValueError for shapes that do not fit and for matrices with clearly negative eigenvalues.
    """
    size = mean1.shape[0]
    if any(mean.shape != (size,) for mean in (mean1, mean2)) or any(cov.shape != (size, size) for cov in (cov1, cov2)):
        shapes = [tuple(tensor.shape) for tensor in (mean1, cov1, mean2, cov2)]
        raise ValueError(f"mean and covariance shapes are {shapes}; use [D], [D, D], [D], [D, D]")
    first, second = cov1.double(), cov2.double()
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * _require_not_negative(values).sqrt()) @ vectors.T
    cross = _require_not_negative(torch.linalg.eigvalsh(root @ second @ root)).sqrt().sum()
    distance = (mean1.double() - mean2.double()).square().sum() + first.trace() + second.trace() - 2.0 * cross
    return distance.item()


def _require_not_negative(eigenvalues: Tensor) -> Tensor:
    largest = eigenvalues.abs().max()
    if eigenvalues.min() < -NEGATIVE_TOLERANCE * largest:
        raise ValueError(
            f"a covariance has the eigenvalue {eigenvalues.min():.3g} beside {largest:.3g}; covariances are symmetric "
            "and have none below zero"
        )
    return eigenvalues.clamp(min=0.0)


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [D] and unbiased covariance [D, D] (float64) of the features of `samples` images of `split`."""

    mean: Tensor
    covariance: Tensor
    samples: int
    split: str
    feature_extractor: str

    @classmethod
    def from_features(cls, features: Tensor, *, split: str, feature_extractor: str) -> FeatureStatistics:
        """Statistics of features [N, D]; raises ValueError for N < 2."""
        _require_features(features, name="the")
        features = features.double()
        return cls(
            mean=features.mean(dim=0),
            covariance=torch.cov(features.T).reshape(features.shape[1], features.shape[1]),
            samples=features.shape[0],
            split=split,
            feature_extractor=feature_extractor,
        )

    def distance(self, other: FeatureStatistics) -> float:
        """Frechet distance to `other`. Raises ValueError when the features come from different extractors."""
        if self.feature_extractor != other.feature_extractor:
            raise ValueError(
                f"statistics come from {self.feature_extractor!r} and {other.feature_extractor!r}; "
                "only those of one extractor compare"
            )
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; counts and names stand in its header as JSON."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        header = {"samples": self.samples, "split": self.split, "feature_extractor": self.feature_extractor}
        tensors = {"mean": self.mean.contiguous(), "covariance": self.covariance.contiguous()}
        save_file(tensors, target, metadata={"statistics": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read a file written by `save`. Raises ValueError for a missing file or one of another kind."""
        if not Path(path).is_file():
            raise ValueError(f"no feature statistics at {path}; write them with FeatureStatistics.save")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "statistics" not in metadata:
                raise ValueError(f"{path} holds no feature statistics; write them with FeatureStatistics.save")
            header = json.loads(metadata["statistics"])
            return cls(mean=file.get_tensor("mean"), covariance=file.get_tensor("covariance"), **header)


@dataclass(frozen=True)
class ReferenceFeatures:
    """Features [M, D] of the real images of a split; those of the other split, with labels, measure the floor.

    Without labels all of `floor_pool` is held against `floor_against`: the halves of a set that has one split alone.
    """

    split: str
    features: Tensor
    floor_pool: Tensor
    floor_labels: Tensor | None
    feature_extractor: str
    floor_against: Tensor | None = None

    def floor_features(self, samples: int, *, seed: int) -> Tensor:
        """`samples` real images of the other split drawn without replacement, or all of them where there are fewer.

        Classes take turns, as they do in the prompts: a draw that left them to chance would make the floor too high.
        Without labels it is always all of them.
        """
        if self.floor_labels is None:
            return self.floor_pool
        order = torch.randperm(len(self.floor_pool), generator=torch.Generator().manual_seed(seed))
        labels = self.floor_labels[order]
        turn = torch.zeros_like(labels)
        for label in labels.unique():
            mine = labels == label
            turn[mine] = torch.arange(int(mine.sum()))
        return self.floor_pool[order[turn.argsort(stable=True)[:samples]]]

    def floor_target(self) -> Tensor:
        """What the features of `floor_features` are compared with."""
        return self.features if self.floor_against is None else self.floor_against


def score_fid(generated: Tensor, reference: ReferenceFeatures, *, seed: int) -> FidResult:
    """FID of generated features [N, D]; `seed` is the one they were generated with and chooses the floor's images."""
    real = reference.floor_features(len(generated), seed=seed)
    return FidResult(
        value=frechet_inception_distance(generated, reference.features),
        samples=len(generated),
        reference_samples=len(reference.features),
        reference_split=reference.split,
        floor=frechet_inception_distance(real, reference.floor_target()),
        floor_samples=len(real),
        feature_extractor=reference.feature_extractor,
        seed=seed,
    )


def score_kid(generated: Tensor, reference: ReferenceFeatures, *, seed: int) -> KidResult:
    """KID of generated features [N, D]; the arguments are those of `score_fid`."""
    real = reference.floor_features(len(generated), seed=seed)
    size = min(kid_subset_size(len(generated), len(reference.features)), len(real), len(reference.floor_target()))
    mean, spread = kernel_inception_distance(generated, reference.features, subset_size=size, seed=seed)
    floor, _ = kernel_inception_distance(real, reference.floor_target(), subset_size=size, seed=seed)
    return KidResult(
        value=mean,
        spread=spread,
        subsets=KID_SUBSETS,
        subset_size=size,
        samples=len(generated),
        reference_samples=len(reference.features),
        reference_split=reference.split,
        floor=floor,
        feature_extractor=reference.feature_extractor,
        seed=seed,
    )
