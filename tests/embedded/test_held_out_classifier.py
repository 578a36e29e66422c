"""The held-out judge learns, is reproducible, and its committed weights have the accuracy of their record."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.embedded.digits.classifier import load_classifier
from fewstep.embedded.digits.held_out_classifier import HeldOutClassifier, load_held_out, save_held_out, train_held_out
from fewstep.embedded.digits.images import caption, load_digits_split
from fewstep.evaluation.scorers.scorer import score


def read_record(folder: Path) -> dict[str, Any]:
    """What was written beside the weights."""
    return json.loads((folder / "classifier.json").read_text(encoding="ascii"))


@pytest.fixture(scope="module")
def judge():
    return train_held_out(1, 3, command="pytest")


@pytest.mark.slow
def test_a_few_epochs_learn_and_repeat(judge) -> None:
    classifier, record = judge
    assert record.test_accuracy > 0.6
    assert record.losses[-1] < 0.7 * record.losses[0]
    state = torch.get_rng_state()
    again = train_held_out(1, 1)[0], train_held_out(1, 1)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in again[0].state_dict().items():
        assert torch.equal(tensor, again[1].state_dict()[name])
    assert sum(parameter.numel() for parameter in classifier.parameters()) < 150_000


def test_saved_judge_is_the_same(judge, tmp_path) -> None:
    save_held_out(*judge, path=tmp_path)
    pixels = torch.rand(3, 3, 32, 32)
    prompts = ["the digit one", "a two", "a bold nine"]
    expected = judge[0](pixels).log_softmax(dim=1)[[0, 1, 2], [1, 2, 9]]
    assert (score(load_held_out(tmp_path), pixels, prompts) - expected).abs().max() < 1e-6
    assert read_record(tmp_path) == json.loads(json.dumps(asdict(judge[1])))


def test_committed_judge_has_the_recorded_accuracy_and_errs_elsewhere(repository) -> None:
    folder = repository / "assets" / "digits_image" / "held_out_classifier"
    scorer, record = load_held_out(folder), read_record(folder)
    assert scorer.card.name == "held_out_log_probability"
    test = load_digits_split("test")
    predicted = scorer.classifier(test.pixels).argmax(dim=1)
    assert (predicted == test.labels).double().mean().item() == pytest.approx(record["test_accuracy"], abs=0.0021)
    assert record["test_accuracy"] >= 0.97
    assert record["command"].startswith("python -m fewstep.evaluation.scorers_held_out --output assets/")
    prompts = [caption(int(label), weight=None, phrasing=0) for label in test.labels]
    assert score(scorer, test.pixels, prompts).mean() > -0.3
    # Noise that fools the training classifier would be no news if both judged alike.
    noise = (test.pixels + 0.6 * torch.randn(test.pixels.shape)).clamp(0.0, 1.0)
    other = load_classifier(folder.parent / "classifier")
    assert (scorer.classifier(noise).argmax(1) != other(noise).argmax(1)).double().mean() > 0.02


def test_mistakes(tmp_path) -> None:
    with pytest.raises(ValueError, match="train it with"):
        load_held_out(tmp_path)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\)"):
        HeldOutClassifier()(torch.rand(2, 3, 16, 16))
    with pytest.raises(ValueError, match="epochs is 0"):
        train_held_out(0, 0)
