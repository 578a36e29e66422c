"""Class accuracy and diversity against hand-made sets."""

import pytest
import torch

from fewstep.embedded.digits.images import load_digits_split
from fewstep.evaluation.accuracy import PairDistances, class_accuracy


def test_accuracy_counts_wrong_labels(trained) -> None:
    images = load_digits_split("test")
    accuracy, per_class = class_accuracy(trained[0], images.pixels, labels=images.labels)
    assert accuracy == pytest.approx(trained[1].test_accuracy)
    assert sum(value for value in per_class if value is not None) / 10 == pytest.approx(accuracy)
    shifted, _ = class_accuracy(trained[0], images.pixels, labels=(images.labels + 1) % 10)
    assert shifted < 0.05
    threes = images.labels == 3
    _, alone = class_accuracy(trained[0], images.pixels[threes], labels=images.labels[threes])
    assert [value is None for value in alone] == [digit != 3 for digit in range(10)]
    with pytest.raises(ValueError, match="for 500 images"):
        class_accuracy(trained[0], images.pixels, labels=images.labels[:3])


def test_diversity_is_the_mean_distance_within_classes() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [10.0, 0.0], [99.0, 99.0]])
    labels = torch.tensor([0, 0, 0, 1, 2])
    # Class 0 has distances 5, 0 and 5; classes 1 and 2 have one image each.
    found = PairDistances.of(features, labels)
    assert found.mean() == pytest.approx(10.0 / 3.0)
    # The second image twice: pairs (0, 1), (0, 1), (0, 2), (1, 2), (1, 2), and no pair of it with itself.
    twice = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0]])
    assert found.means(twice).item() == pytest.approx(4 * 5.0 / 5)
    collapsed = torch.arange(3.0)[labels, None].expand(-1, 2)
    assert PairDistances.of(collapsed, labels).mean() == 0.0
    with pytest.raises(ValueError, match="no class has two"):
        PairDistances.of(features[2:], labels[2:])
