"""Distances against closed forms, torchmetrics, and each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewstep.evaluation.fid import (
    FeatureStatistics,
    ReferenceFeatures,
    extract_features,
    frechet_distance,
    frechet_inception_distance,
    kernel_inception_distance,
    kid_subset_size,
    score_fid,
    score_kid,
)


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


@pytest.mark.parametrize(("samples", "size"), [(300, 8), (40, 16), (10, 16)])
def test_closed_form_equals_torchmetrics(samples: int, size: int) -> None:
    """Also with fewer samples than features, where covariances are singular."""
    generated = torch.randn(samples, size, dtype=torch.float64) * 1.3 + 0.2
    reference = torch.randn(samples + 7, size, dtype=torch.float64)
    first = FeatureStatistics.from_features(generated, split="test", feature_extractor="x")
    second = FeatureStatistics.from_features(reference, split="test", feature_extractor="x")
    assert first.distance(second) == pytest.approx(frechet_inception_distance(generated, reference), rel=1e-5)
    assert frechet_inception_distance(generated, generated) == pytest.approx(0.0, abs=1e-5)


def test_fid_of_gaussian_samples_approaches_the_closed_form() -> None:
    generated = torch.randn(50_000, 3, dtype=torch.float64) * 2.0 + 1.0
    reference = torch.randn(50_000, 3, dtype=torch.float64)
    assert frechet_inception_distance(generated, reference) == pytest.approx(3.0 + 3.0, rel=0.03)


def test_kid_of_a_shift_is_its_closed_form() -> None:
    """k = (x y + 1)^3, N(m, 1) and N(0, 1): MMD^2 is the sum over i of binom(3, i) (difference of moments i)^2."""
    shift = 0.5
    moments = [shift, shift**2 + 1.0, shift**3 + 3.0 * shift]
    expected = 3 * (moments[0]) ** 2 + 3 * (moments[1] - 1.0) ** 2 + moments[2] ** 2
    generated = torch.randn(20_000, 1, dtype=torch.float64) + shift
    reference = torch.randn(20_000, 1, dtype=torch.float64)
    mean, spread = kernel_inception_distance(generated, reference, subsets=40, subset_size=500)
    assert mean == pytest.approx(expected, rel=0.1)
    assert spread < 0.5 * expected


def test_kid_is_seeded_and_leaves_the_global_generator_alone() -> None:
    generated, reference = torch.randn(60, 4), torch.randn(50, 4)
    state = torch.get_rng_state()
    first = kernel_inception_distance(generated, reference, seed=1)
    assert first == kernel_inception_distance(generated, reference, seed=1)
    assert first != kernel_inception_distance(generated, reference, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert kid_subset_size(60, 50) == 25
    assert kid_subset_size(50_000, 50_000) == 1000


def test_results_state_counts_floor_and_seed() -> None:
    reference = ReferenceFeatures("test", torch.randn(200, 4), torch.randn(120, 4), torch.arange(120) % 10, "random")
    generated = torch.randn(150, 4) + 1.0
    fid = score_fid(generated, reference, seed=3)
    assert (fid.samples, fid.reference_samples, fid.floor_samples, fid.seed) == (150, 200, 120, 3)
    assert (fid.reference_split, fid.feature_extractor) == ("test", "random")
    assert fid.value > 3.0
    assert 0.0 < fid.floor < 0.5
    assert fid.floor == frechet_inception_distance(reference.floor_features(150, seed=3), reference.features)
    kid = score_kid(generated, reference, seed=3)
    assert (kid.samples, kid.subsets, kid.subset_size, kid.seed) == (150, 50, 75, 3)
    assert kid.value > 10.0 * abs(kid.floor)


def test_floor_draws_without_replacement_and_classes_in_turn() -> None:
    pool = torch.arange(60.0)[:, None]
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] * 5)
    reference = ReferenceFeatures("test", pool, pool, labels, "x")
    drawn = reference.floor_features(20, seed=0)
    assert len(drawn.unique()) == 20
    assert labels[drawn[:, 0].long()].bincount().tolist() == [8, 7, 5]
    assert len(reference.floor_features(999, seed=0).unique()) == 60
    assert not torch.equal(drawn, reference.floor_features(20, seed=1))


def test_statistics_survive_a_file(tmp_path) -> None:
    features = torch.randn(30, 5)
    statistics = FeatureStatistics.from_features(features, split="train", feature_extractor="digits")
    statistics.save(tmp_path / "folder" / "train.safetensors")
    again = FeatureStatistics.load(tmp_path / "folder" / "train.safetensors")
    assert torch.equal(again.mean, statistics.mean)
    assert torch.equal(again.covariance, statistics.covariance)
    assert (again.samples, again.split, again.feature_extractor) == (30, "train", "digits")
    assert again.covariance.dtype == torch.float64
    with pytest.raises(ValueError, match="no feature statistics at"):
        FeatureStatistics.load(tmp_path / "nowhere.safetensors")
    other = FeatureStatistics.from_features(features, split="train", feature_extractor="inception")
    with pytest.raises(ValueError, match="only those of one extractor"):
        statistics.distance(other)


def test_bad_input_is_an_error() -> None:
    identity, bad = torch.eye(2), torch.diag(torch.tensor([1.0, -0.5]))
    with pytest.raises(ValueError, match="none below zero"):
        frechet_distance(torch.zeros(2), bad, torch.zeros(2), identity)
    with pytest.raises(ValueError, match=r"use \[D\], \[D, D\]"):
        frechet_distance(torch.zeros(2), identity, torch.zeros(3), identity)
    with pytest.raises(ValueError, match="N >= 2"):
        frechet_inception_distance(torch.randn(1, 3), torch.randn(5, 3))
    flatten = nn.Flatten()
    with pytest.raises(ValueError, match=r"need \[0, 1\]"):
        extract_features(flatten, torch.full((2, 3, 4, 4), 1.5))
    with pytest.raises(ValueError, match=r"\(0, 3, 4, 4\)"):
        extract_features(flatten, torch.rand(0, 3, 4, 4))
    with pytest.raises(ValueError, match="not finite"):
        extract_features(nn.Sequential(flatten, nn.Threshold(2.0, math.nan)), torch.rand(2, 3, 4, 4))
