"""The classifier learns, is reproducible, and its features work inside torchmetrics."""

import json
from dataclasses import asdict

import pytest
import torch

from fewstep.embedded.digits.classifier import (
    DigitFeatures,
    DigitsClassifier,
    accuracy_on,
    augment,
    load_classifier,
    train_classifier,
)
from fewstep.embedded.digits.images import load_digits_split
from fewstep.evaluation.measures.features import extract_features
from fewstep.evaluation.measures.statistics import feature_distance


def test_a_few_epochs_reach_the_accuracy(trained) -> None:
    classifier, record = trained
    assert record.test_accuracy >= 0.98
    assert record.test_images == 500
    assert record.losses[-1] < 0.3 * record.losses[0]
    test = load_digits_split("test")
    assert accuracy_on(classifier, test.pixels, labels=test.labels) == record.test_accuracy


def test_training_depends_on_seed_and_epochs_alone(trained) -> None:
    torch.manual_seed(99)
    state = torch.get_rng_state()
    first, second = train_classifier(4, 1), train_classifier(4, 1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name])
    assert first[1].losses == second[1].losses
    assert len(first[1].losses) == 1
    assert any((tensor != trained[0].state_dict()[name]).any() for name, tensor in first[0].state_dict().items())


def test_shapes_and_smoothness(trained) -> None:
    classifier = trained[0]
    pixels = torch.rand(5, 3, 32, 32, requires_grad=True)
    features = classifier.features(pixels)
    assert features.shape == (5, 64)
    assert classifier(pixels).shape == (5, 10)
    (gradient,) = torch.autograd.grad(features.sum(), pixels)
    assert gradient.abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"\(5, 3, 16, 16\)"):
        classifier(torch.rand(5, 3, 16, 16))


def test_features_do_not_depend_on_the_batch(trained) -> None:
    extractor = DigitFeatures(trained[0])
    pixels = load_digits_split("test").pixels[:40]
    whole = extract_features(extractor, pixels, batch_size=40)
    assert whole.dtype == torch.float32
    assert (extract_features(extractor, pixels, batch_size=7) - whole).abs().max() < 1e-4


def test_noise_is_a_distance(trained) -> None:
    extractor = DigitFeatures(trained[0])
    real = load_digits_split("test").pixels[:200]
    fake = (real + 0.3 * torch.rand(real.shape)).clamp(0.0, 1.0)
    features = extract_features(extractor, real)
    assert feature_distance(extract_features(extractor, fake), features) > 0.1
    assert feature_distance(features, features) < 1e-6
    assert len(extractor.digest) == 64


def test_features_see_ink(trained) -> None:
    """The mean brightness can be read linearly from the features, so FID notices a wrong stroke weight."""
    images = load_digits_split("test")
    features = extract_features(DigitFeatures(trained[0]), images.pixels).double()
    ink = images.pixels.mean(dim=(1, 2, 3)).double()[:, None]
    design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    fitted = design[:250] @ torch.linalg.lstsq(design[:250], ink[:250]).solution
    explained = 1.0 - ((fitted - ink[:250]) ** 2).sum() / ((ink[:250] - ink[:250].mean()) ** 2).sum()
    assert explained > 0.9


def test_augmentation_is_seeded_small_and_in_range() -> None:
    pixels = load_digits_split("train").pixels[:64]
    first = augment(pixels, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, augment(pixels, generator=torch.Generator().manual_seed(1)))
    assert first.min() >= 0.0
    assert first.max() <= 1.0
    assert 0.01 < (first - pixels).abs().mean() < 0.2


def test_saved_classifier_is_the_same(trained, classifier_folder, tmp_path) -> None:
    pixels = torch.rand(4, 3, 32, 32)
    assert torch.equal(load_classifier(classifier_folder)(pixels), trained[0](pixels))
    assert json.loads((classifier_folder / "classifier.json").read_text()) == json.loads(json.dumps(asdict(trained[1])))
    assert sorted(path.suffix for path in classifier_folder.iterdir()) == [".json", ".safetensors"]
    with pytest.raises(ValueError, match="no classifier weights"):
        load_classifier(tmp_path)


def test_no_epochs_is_an_error() -> None:
    with pytest.raises(ValueError, match="epochs is 0"):
        train_classifier(0, 0)


def test_untrained_classifier_guesses() -> None:
    test = load_digits_split("test")
    assert accuracy_on(DigitsClassifier(), test.pixels, labels=test.labels) < 0.5
