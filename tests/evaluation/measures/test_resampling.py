"""The bootstrap: what is drawn together, what within its kind, and how often intervals hold the truth."""

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.evaluation.measures import kernel
from fewstep.evaluation.measures.frechet import distance_influences
from fewstep.evaluation.measures.kernel import (
    cmmd_influences,
    kernel_inception_distance,
    kid_influences,
)
from fewstep.evaluation.measures.resampling import (
    Draws,
    Error,
    Population,
    interval_of,
    paired_difference,
    proportion_interval,
)
from fewstep.evaluation.measures.statistics import FeatureStatistics, feature_distance, frechet_distance


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=40), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_rows_are_drawn_within_their_strata(labels: list[int], seed: int) -> None:
    strata = torch.tensor(labels)
    rows = Population(len(labels), strata=strata).draw(torch.Generator().manual_seed(seed))
    assert torch.equal(strata[rows], strata)


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=8), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_clusters_are_drawn_whole(sizes: list[int], seed: int) -> None:
    clusters = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    clusters = clusters[torch.randperm(len(clusters), generator=torch.Generator().manual_seed(seed))]
    rows = Population(len(clusters), clusters=clusters).draw(torch.Generator().manual_seed(seed))
    counts = torch.bincount(rows, minlength=len(clusters))
    for number in range(len(sizes)):
        assert len(counts[clusters == number].unique()) == 1
    drawn = sum(int(counts[clusters == number][0]) for number in range(len(sizes)))
    assert drawn == len(sizes)


def test_prompts_that_come_once_are_single_images() -> None:
    assert Population.of_prompts(["a", "b", "c"]).clusters is None
    assert Population.of_prompts(["a", "a", "a"]).clusters is None
    found = Population.of_prompts(["a", "b", "a"]).clusters
    assert found is not None
    assert found.tolist() == [0, 1, 0]


def test_draws_are_the_same_for_every_system() -> None:
    first, second = (Draws(Population(50), Population(20), count=3, seed=4) for _ in range(2))
    assert torch.equal(first.image_counts(), second.image_counts())
    assert torch.equal(first.image_counts().sum(dim=1), torch.full((3,), 50.0).double())
    counts = torch.bincount(first.image_rows(2), minlength=50).double()
    assert torch.equal(first.image_counts()[2], counts)
    assert not torch.equal(first.image_rows(0), first.image_rows(1))
    other = Draws(Population(50), Population(30), count=3, seed=4)
    assert torch.equal(other.image_rows(1), first.image_rows(1))


def test_an_interval_of_a_mean_is_the_usual_one() -> None:
    values = torch.randn(400).double()
    counts = Draws(Population(400), None, count=2000, seed=0).image_counts()
    replicates = counts @ values / 400
    found = interval_of(values.mean().item(), Error(replicates))
    half = 1.96 * values.std().item() / math.sqrt(400)
    assert found.high - values.mean().item() == pytest.approx(half, rel=0.08)
    assert interval_of(0.01, Error(torch.tensor([0.0, 1.0])), low=0.0).low == 0.0


def test_a_share_of_all_is_no_point() -> None:
    """100 of 100 right: Wilson's interval is [1 / (1 + z^2 / n), 1]."""
    found = proportion_interval(1.0, Error(torch.ones(50)), samples=100)
    assert found.low == pytest.approx(1.0 / (1.0 + 1.959964**2 / 100), rel=1e-5)
    assert found.high == 1.0
    # Fifty prompts of two equal images are fifty images.
    values = torch.bernoulli(torch.full((50,), 0.8)).repeat_interleave(2).double()
    clusters = Population(100, clusters=torch.arange(50).repeat_interleave(2))
    replicates = Draws(clusters, None, count=3000, seed=1).image_counts() @ values / 100
    share = values.mean().item()
    z, n = 1.959964, 50
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    wide = proportion_interval(share, Error(replicates), samples=100)
    assert wide.high - wide.low == pytest.approx(2 * half, rel=0.1)
    assert (wide.high + wide.low) / 2 == pytest.approx(centre, rel=0.02)


SIZE, COUNT, PICTURES = 6, 150, 200


def simulated(drifts: tuple[float, float], seed: int) -> tuple[list[Tensor], Tensor]:
    """Features of two systems that share their noise, as those of one evaluation do, and of reference pictures."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(PICTURES, SIZE, generator=generator)
    shared = torch.randn(COUNT, SIZE, generator=generator)
    own = [torch.randn(COUNT, SIZE, generator=generator) for _ in drifts]
    return [0.8 * shared + 0.6 * part + drift for part, drift in zip(own, drifts, strict=True)], reference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "influences"),
    [(feature_distance, distance_influences), (kernel_inception_distance, kid_influences)],
    ids=["fid", "kid"],
)
@pytest.mark.parametrize("drifts", [(0.3, 0.1), (0.2, 0.2), (0.0, 0.0)])
def test_intervals_of_differences_hold_the_truth_as_often_as_they_say(
    measure: Callable[[Tensor, Tensor], float],
    influences: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    drifts: tuple[float, float],
) -> None:
    """100 simulated evaluations; also where both systems have one law, and where that is the law of real pictures."""
    truth = 0.0
    if drifts[0] != drifts[1]:
        found = (simulated(drifts, seed) for seed in range(10_000, 11_000))
        truth = statistics.fmean(measure(sides[0], real) - measure(sides[1], real) for sides, real in found)
    hits = 0
    for seed in range(100):
        sides, reference = simulated(drifts, seed)
        draws = Draws(Population(COUNT), Population(PICTURES), count=0)
        values = [[measure(side, reference)] for side in sides]
        errors = [[Error.of_distance(influences(side, reference), draws)] for side in sides]
        difference = paired_difference(values[0], values[1], (errors[0], errors[1]))
        hits += difference.low <= truth <= difference.high
    # Two sets of real pictures have half the variance that the intervals assume, and no system is one.
    assert 90 <= hits <= (100 if drifts == (0.0, 0.0) else 99)


@pytest.mark.parametrize("measure", ["fid", "kid", "cmmd", "strata"])
def test_influences_are_derivatives_in_the_weight_of_a_row(measure: str) -> None:
    """A row that counts a little more moves the distance by its influence over N."""
    generated, reference = torch.randn(40, 3).double() * 1.2 + 0.4, torch.randn(30, 3).double()
    labels = (torch.arange(40) % 2, torch.arange(30) % 2)
    row, step = 7, 1e-4
    weights = torch.ones(1, 40).double().repeat(2, 1)
    # Within its stratum, so that shares of labels stay what they are.
    others = (labels[0] == labels[0][row]) if measure == "strata" else torch.ones(40, dtype=torch.bool)
    for sign, line in ((1.0, 0), (-1.0, 1)):
        weights[line][others] -= sign * step / int(others.sum())
        weights[line][row] += sign * step
    strata = labels if measure == "strata" else None
    if measure == "fid":
        values = [weighted_fid(generated, reference, line) for line in weights]
        influence = distance_influences(generated, reference)[0]
    elif measure == "cmmd":
        values = [weighted_kernel(kernel.gaussian_kernel, generated, reference, line, None) for line in weights]
        influence = cmmd_influences(generated, reference)[0] / kernel.CMMD_SCALE
    else:
        values = [weighted_kernel(kernel.polynomial_kernel, generated, reference, line, strata) for line in weights]
        influence = kid_influences(generated, reference, strata=strata)[0]
    expected = influence[row] - influence[others].mean()
    found = 40 * (values[0] - values[1]) / (2 * step)
    assert found == pytest.approx(expected.item(), rel=0.12 if measure != "fid" else 0.05)


def weighted_kernel(
    own: Callable[[Tensor, Tensor], Tensor],
    generated: Tensor,
    reference: Tensor,
    weights: Tensor,
    strata: tuple[Tensor, Tensor] | None,
) -> float:
    """The kernel distance with weights on the images; what depends on the reference pictures alone is left out."""
    labels = torch.zeros(len(weights), dtype=torch.int64) if strata is None else strata[0]
    pairs, gram = weights[:, None] * weights[None], own(generated, generated)
    total, found = weights.sum(), 0.0
    alike = labels[:, None] == labels[None]
    found += float((pairs * gram)[~alike].sum() / total**2)
    for label in labels.unique():
        inside = (labels == label).nonzero()[:, 0]
        block, mass = (pairs * gram)[inside][:, inside], weights[inside].sum()
        apart = block.sum() - block.diagonal().sum()
        found += float((mass / total) ** 2 * apart / (mass**2 - weights[inside].square().sum()))
    across = (weights[:, None] * own(generated, reference)).sum() / (total * len(reference))
    return found - 2.0 * float(across)


def weighted_fid(generated: Tensor, reference: Tensor, weights: Tensor) -> float:
    shares = weights / weights.sum()
    mean = shares @ generated
    covariance = (generated - mean).T @ ((generated - mean) * shares[:, None]) * 40 / 39
    other = FeatureStatistics.from_features(reference, source="")
    return frechet_distance(mean, covariance, other.mean, other.covariance)


@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=8), seed=st.integers(0, 50), kind=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_the_closed_variance_is_that_of_the_draws(sizes: list[int], seed: int, kind: int) -> None:
    labels = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    rows = {0: {}, 1: {"strata": labels}, 2: {"clusters": labels}}[kind]
    population = Population(len(labels), **rows)
    values = torch.randn(len(labels), generator=torch.Generator().manual_seed(seed)).double()
    counts = Draws(population, None, count=6000, seed=seed).image_counts()
    # Of clusters the number of rows varies, which moves the mean of a value that is 0 on average by less than this
    # test sees.
    drawn = (counts @ (values - values.mean()) / len(labels)).var().item()
    assert population.variance_of_mean(values) == pytest.approx(drawn, rel=0.12, abs=1e-6)


def test_training_runs_add_their_spread() -> None:
    """Welch: two groups of three runs, nothing measured; s^2 = 1 and 4, so the half width is t sqrt(5 / 3)."""
    still = [Error(torch.zeros(10))] * 3
    found = paired_difference([1.0, 2.0, 3.0], [0.0, 2.0, 4.0], (still, still))
    freedom = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    from scipy.stats import t

    assert found.value == 0.0
    assert found.high == pytest.approx(t.ppf(0.975, freedom) * math.sqrt(5 / 3), rel=1e-9)
    assert not found.decided
    single = paired_difference([1.0], [0.0], ([Error(torch.randn(500) * 0.1)], [Error(torch.zeros(500))]))
    assert single.decided
    assert single.high - single.value == pytest.approx(0.196, rel=0.15)


def test_bad_populations_are_errors() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="exclude each other"):
        Population(3, strata=labels, clusters=labels)
    with pytest.raises(ValueError, match="3 labels for 4 rows"):
        Population(4, strata=labels)
    with pytest.raises(ValueError, match="at least two rows"):
        Population(1)
    with pytest.raises(ValueError, match="needs at least 2"):
        interval_of(0.0, Error(torch.zeros(1)))
