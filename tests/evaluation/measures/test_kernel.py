"""KID and CMMD against closed forms, the reference packages, and sets that are balanced over classes."""

import math

import cleanfid.fid as clean_fid
import numpy as np
import pytest
import torch
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from fewstep.embedded.digits.classifier import DigitFeatures, load_classifier
from fewstep.embedded.digits.images import load_digits_split
from fewstep.evaluation.measures import kernel
from fewstep.evaluation.measures.features import extract_features
from fewstep.evaluation.measures.kernel import (
    clip_maximum_mean_discrepancy,
    kernel_inception_distance,
)


def test_kid_of_a_shift_is_its_closed_form() -> None:
    """k = (x y + 1)^3, N(m, 1) and N(0, 1): MMD^2 is the sum over i of binom(3, i) (difference of moments i)^2."""
    shift = 0.5
    moments = [shift, shift**2 + 1.0, shift**3 + 3.0 * shift]
    expected = 3 * (moments[0]) ** 2 + 3 * (moments[1] - 1.0) ** 2 + moments[2] ** 2
    generated = torch.randn(6_000, 1, dtype=torch.float64) + shift
    reference = torch.randn(6_000, 1, dtype=torch.float64)
    assert kernel_inception_distance(generated, reference) == pytest.approx(expected, rel=0.15)


def test_kid_equals_the_reference_packages() -> None:
    """Their subsets hold all rows here, so nothing is left to chance."""
    generated, reference = torch.randn(120, 10) + 0.2, torch.randn(120, 10)
    own = kernel_inception_distance(generated, reference)
    settings = {"kid_subsets": 1, "kid_subset_size": 120, "verbose": False}
    theirs = kid_features_to_metric(generated.double(), reference.double(), **settings)
    assert own == pytest.approx(theirs[KEY_METRIC_KID_MEAN], rel=1e-9)
    sides = [side.double().numpy() for side in (reference, generated)]
    assert own == pytest.approx(clean_fid.kernel_distance(*sides, num_subsets=1, max_subset_size=120), rel=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, reference = torch.randn(33, 4), torch.randn(25, 4)
    whole = kernel_inception_distance(generated, reference)
    monkeypatch.setattr(kernel, "BLOCK", 5)
    assert kernel_inception_distance(generated, reference) == pytest.approx(whole, rel=1e-12)


def balanced(features: torch.Tensor, labels: torch.Tensor, per_class: int, generator: torch.Generator) -> torch.Tensor:
    rows = []
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        rows.append(mine[torch.randperm(len(mine), generator=generator)[:per_class]])
    return torch.cat(rows)


def test_real_against_real_is_zero_within_its_error() -> None:
    """60 splits of the real digits into sets with the same number of each digit: the usual estimate is far below 0,
    the one that knows the digits is not; both are means of 60 splits over their standard errors."""
    images = [load_digits_split(split) for split in ("train", "test")]
    extractor = DigitFeatures(load_classifier("assets/digits_image/classifier"))
    features = torch.cat([extract_features(extractor, part.pixels) for part in images])
    labels = torch.cat([part.labels for part in images])
    generator = torch.Generator().manual_seed(0)
    plain, weighted = [], []
    for _ in range(60):
        rows = balanced(features, labels, 60, generator)
        # Every second row of each digit.
        sides = rows[0::2], rows[1::2]
        strata = (labels[sides[0]], labels[sides[1]])
        plain.append(kernel_inception_distance(features[sides[0]], features[sides[1]]))
        weighted.append(kernel_inception_distance(features[sides[0]], features[sides[1]], strata=strata))
    deviations = [np.mean(found) / (np.std(found, ddof=1) / math.sqrt(60)) for found in (plain, weighted)]
    assert deviations[0] < -10.0
    assert abs(deviations[1]) < 2.0


def test_one_label_is_no_strata() -> None:
    generated, reference = torch.randn(30, 4), torch.randn(20, 4)
    same = (torch.zeros(30, dtype=torch.int64), torch.zeros(20, dtype=torch.int64))
    assert kernel_inception_distance(generated, reference, strata=same) == pytest.approx(
        kernel_inception_distance(generated, reference), rel=1e-10
    )
    alone = same[0].clone()
    alone[3] = 1
    with pytest.raises(ValueError, match="label 1 has one picture"):
        kernel_inception_distance(generated, reference, strata=(alone, same[1]))


def test_cmmd_is_the_kernel_distance_of_the_paper() -> None:
    """Two points a, b against two points c, d, with the numbers of the released code: width 10, factor 1000."""
    generated, reference = torch.eye(4)[:2], torch.eye(4)[2:]
    same, other = 1.0, math.exp(-2.0 / 200.0)
    expected = 1000.0 * (2 * (same + other) / 2 - 2.0 * other)
    assert clip_maximum_mean_discrepancy(generated, reference) == pytest.approx(expected, rel=1e-6)
    assert clip_maximum_mean_discrepancy(generated, generated) == pytest.approx(0.0, abs=1e-9)
