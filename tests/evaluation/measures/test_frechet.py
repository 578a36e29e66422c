"""Distances against closed forms, torchmetrics, and each other."""

import math
from pathlib import Path
from typing import Any

import cleanfid.fid as clean_fid
import numpy as np
import pytest
import pytorch_fid.fid_score as pytorch_fid
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fewstep.evaluation.measures import statistics
from fewstep.evaluation.measures.frechet import distance_at_infinity
from fewstep.evaluation.measures.statistics import FeatureStatistics, feature_distance, frechet_distance


def random_covariance(size: int, generator: torch.Generator) -> torch.Tensor:
    factor = torch.randn(size, size + 3, generator=generator, dtype=torch.float64)
    return factor @ factor.T / size


@given(seed=st.integers(0, 10_000), size=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_of_diagonal_gaussians(seed: int, size: int) -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2, also after a common rotation."""
    generator = torch.Generator().manual_seed(seed)
    mean1, mean2 = torch.randn(2, size, generator=generator, dtype=torch.float64)
    std1, std2 = torch.rand(2, size, generator=generator, dtype=torch.float64) + 0.05
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    cov1, cov2 = (rotation @ torch.diag(std**2) @ rotation.T for std in (std1, std2))
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected.item(), abs=1e-9)


def test_frechet_distance_of_two_by_two_matrices() -> None:
    """tr (A B)^(1/2) of 2 x 2 matrices is sqrt(tr AB + 2 sqrt(det AB)), also where A and B do not commute."""
    cov1 = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    cov2 = torch.tensor([[0.5, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    product = cov1 @ cov2
    cross = math.sqrt(product.trace() + 2.0 * math.sqrt(torch.linalg.det(product)))
    zero = torch.zeros(2, dtype=torch.float64)
    expected = float(cov1.trace() + cov2.trace()) - 2.0 * cross
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_frechet_distance_properties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean1, mean2 = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    cov1, cov2 = random_covariance(5, generator), random_covariance(5, generator)
    there, back = frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1)
    assert there == pytest.approx(back, rel=1e-9)
    assert there > 0.0
    assert frechet_distance(mean1, cov1, mean1, cov1) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(3.0 * mean1, 9.0 * cov1, 3.0 * mean2, 9.0 * cov2) == pytest.approx(9.0 * there, rel=1e-8)


@pytest.mark.parametrize(("samples", "size"), [(1297, 64), (300, 8), (40, 16), (10, 16)])
def test_distance_equals_the_reference_packages(samples: int, size: int) -> None:
    """torchmetrics, and for full-rank covariances clean-fid and pytorch-fid, on the same features."""
    generated = torch.randn(samples, size, dtype=torch.float64) * 1.3 + 0.2
    reference = torch.randn(samples // 2 + 7, size, dtype=torch.float64)
    own = feature_distance(generated, reference)
    metric = FrechetInceptionDistance(feature=Rows(size), normalize=True)
    metric.update(reference, real=True)
    metric.update(generated, real=False)
    assert own == pytest.approx(metric.compute().item(), rel=1e-6 if samples // 2 > size else 1e-5)
    if samples // 2 > size:
        moments = [
            part for side in (generated, reference) for part in (side.mean(dim=0).numpy(), np.cov(side.T.numpy()))
        ]
        packages: list[Any] = [clean_fid.frechet_distance, pytorch_fid.calculate_frechet_distance]
        for package in packages:
            assert own == pytest.approx(float(package(*moments)), rel=1e-6)


class Rows(nn.Module):
    """Hands features through torchmetrics."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def test_statistics_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(50, 6)
    whole = FeatureStatistics.from_features(features, source="x")
    monkeypatch.setattr(statistics, "CHUNK", 7)
    parts = FeatureStatistics.from_features(features, source="x")
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.covariance, torch.cov(features.double().T), rtol=1e-12, atol=1e-12)
    rows = torch.tensor([0, 0, 4, 9, 9, 9])
    some = FeatureStatistics.from_features(features, source="x", rows=rows)
    torch.testing.assert_close(some.covariance, torch.cov(features[rows].double().T), rtol=1e-12, atol=1e-12)


def test_fid_of_gaussian_samples_approaches_the_closed_form() -> None:
    generated = torch.randn(50_000, 3, dtype=torch.float64) * 2.0 + 1.0
    reference = torch.randn(50_000, 3, dtype=torch.float64)
    assert feature_distance(generated, reference) == pytest.approx(3.0 + 3.0, rel=0.03)


def test_the_line_ends_at_infinitely_many_images() -> None:
    """Two samples of one law: FID of 4,000 images is biased upwards, and what is left at infinity is near 0."""
    size = 16
    truth = FeatureStatistics(torch.zeros(size).double(), torch.eye(size).double(), None, "x")
    sets = torch.randn(40, 1000, size)
    biased = [FeatureStatistics.from_features(one, source="x").distance(truth) for one in sets]
    line = [distance_at_infinity(one, truth, seed=seed) for seed, one in enumerate(sets)]
    assert sum(biased) / 40 > 0.05
    assert abs(sum(line) / 40) < 0.15 * sum(biased) / 40
    with pytest.raises(ValueError, match="N >= 40"):
        distance_at_infinity(sets[0, :30], truth, seed=0)


def test_statistics_travel_to_other_packages_and_back(tmp_path: Path) -> None:
    features = torch.randn(30, 5)
    own = FeatureStatistics.from_features(features, source="inception")
    own.save(tmp_path / "folder" / "photos.npz")
    # pytorch-fid reads exactly these two entries of such a file.
    place = str(tmp_path / "folder" / "photos.npz")
    mean, covariance = pytorch_fid.compute_statistics_of_path(place, None, 1, 5, "cpu", 0)
    assert np.array_equal(mean, own.mean.numpy())
    assert np.array_equal(covariance, own.covariance.numpy())
    again = FeatureStatistics.load(tmp_path / "folder" / "photos.npz", source="inception")
    assert torch.equal(again.covariance, own.covariance)
    assert (again.samples, again.source) == (30, "inception")
    with pytest.raises(ValueError, match="holds statistics of 'inception', and 'other' is asked for"):
        FeatureStatistics.load(tmp_path / "folder" / "photos.npz", source="other")
    # clean-fid and pytorch-fid write mu and sigma alone.
    np.savez_compressed(tmp_path / "theirs.npz", mu=mean, sigma=covariance)
    theirs = FeatureStatistics.load(tmp_path / "theirs.npz", source="other")
    assert (theirs.samples, theirs.source) == (None, "other")
    assert theirs.distance(FeatureStatistics.from_features(features, source="other")) == pytest.approx(0.0, abs=1e-9)


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no statistics at"):
        FeatureStatistics.load(tmp_path / "a.npz", source="x")
    (tmp_path / "b.npz").write_bytes(b"text")
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "d.npz", features=np.zeros(3))
    np.savez(tmp_path / "e.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    for name, message in (("b", "no .npz file"), ("c", r"\[D\] and \[D, D\]"), ("d", "mu"), ("e", "no .npz file")):
        with pytest.raises(ValueError, match=message):
            FeatureStatistics.load(tmp_path / f"{name}.npz", source="x")
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        FeatureStatistics.from_features(torch.randn(4, 2), source="x").save(tmp_path / "a.pkl")
    sides = [FeatureStatistics.from_features(torch.randn(4, 2), source=name) for name in "ab"]
    with pytest.raises(ValueError, match="only those of one source compare"):
        sides[0].distance(sides[1])


def test_bad_input_is_an_error() -> None:
    identity, bad = torch.eye(2), torch.diag(torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="none below zero"):
        frechet_distance(torch.zeros(2), bad, torch.zeros(2), identity)
    with pytest.raises(ValueError, match=r"use \[D\], \[D, D\]"):
        frechet_distance(torch.zeros(2), identity, torch.zeros(3), identity)
    with pytest.raises(ValueError, match="N >= 2"):
        feature_distance(torch.randn(1, 3), torch.randn(5, 3))
