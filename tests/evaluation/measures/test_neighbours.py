"""Precision, recall, density and coverage against hand-made sets and torch-fidelity."""

import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from fewstep.evaluation.measures import neighbours
from fewstep.evaluation.measures.neighbours import density_coverage, nearest_distance, precision_recall


def test_precision_and_recall_equal_torch_fidelity() -> None:
    generated, reference = torch.randn(150, 6).double() * 0.8, torch.randn(130, 6).double() + 0.3
    rows = precision_recall(generated, reference)
    theirs = calculate_precision_recall_full(generated, reference, 3)
    assert rows.of_images.mean().item() == pytest.approx(theirs[0], abs=1e-6)
    assert rows.of_references.mean().item() == pytest.approx(theirs[1], abs=1e-6)
    assert 0.2 < theirs[1] < theirs[0] < 1.0


def test_a_line_of_points_has_what_one_counts() -> None:
    """Real pictures at 0, 1, 2, 3; images at 0.5 and 10; one neighbour, so each ball has radius 1."""
    reference, generated = torch.arange(4.0)[:, None], torch.tensor([[0.5], [10.0]])
    rows = density_coverage(generated, reference, neighbours=1)
    # 0.5 lies in the balls of 0 and 1.
    assert rows.of_images.tolist() == [2.0, 0.0]
    # The nearest image of 0 and of 1 is half a step away; of 2 and 3 it is beyond their balls.
    assert rows.of_references.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert precision_recall(generated, reference, neighbours=1).of_images.tolist() == [1.0, 0.0]
    assert nearest_distance(generated, reference).tolist() == [0.5, 7.0]


def test_the_same_law_has_density_and_coverage_near_their_known_values() -> None:
    """Density is 1 in the mean, coverage 1 - (N - 1) ... = 1 - 0.5^5 (arXiv:2002.09797, section 3.3)."""
    generated, reference = torch.randn(2000, 4), torch.randn(2000, 4)
    rows = density_coverage(generated, reference)
    assert rows.of_images.mean().item() == pytest.approx(1.0, abs=0.05)
    assert rows.of_references.mean().item() == pytest.approx(1.0 - 0.5**5, abs=0.02)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, reference = torch.randn(40, 3), torch.randn(35, 3)
    whole = precision_recall(generated, reference), density_coverage(generated, reference)
    monkeypatch.setattr(neighbours, "BLOCK", 6)
    parts = precision_recall(generated, reference), density_coverage(generated, reference)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.of_images, other.of_images)
        assert torch.equal(one.of_references, other.of_references)
    with pytest.raises(ValueError, match="N >= 4"):
        precision_recall(generated, reference[:3])
