"""Rewards of the digits against closed forms."""

import math

import pytest
import torch

from fewstep.embedded.digits.images import caption, load_digits_split
from fewstep.embedded.digits.scorers import (
    BACKGROUND_INK,
    DigitLogProbability,
    Slant,
    StrokeWeight,
    load_digit_log_probability,
)
from fewstep.evaluation.scorers.scorer import score


def blob(*, lean: float, wide: float = 2.0, tall: float = 4.0, x0: float = 0.0, y0: float = 0.0) -> torch.Tensor:
    """A Gaussian picture [1, 3, 48, 48] whose rows are shifted right by `lean` per pixel upwards."""
    x = torch.arange(48, dtype=torch.float64) - 23.5
    y = 23.5 - torch.arange(48, dtype=torch.float64)
    moved = x[None, :] - x0 - lean * (y[:, None] - y0)
    return torch.exp(-(moved**2) / (2.0 * wide**2) - (y[:, None] - y0) ** 2 / (2.0 * tall**2)).expand(1, 3, -1, -1)


@pytest.mark.parametrize("lean", [-0.7, 0.0, 0.3, 1.1])
@pytest.mark.parametrize(("x0", "y0", "brightness"), [(0.0, 0.0, 1.0), (3.0, -2.0, 0.4)])
def test_slant_of_a_sheared_gaussian_is_its_shear(lean, x0, y0, brightness) -> None:
    """cov(x, y) = lean * 4^2 and var(y) = 4^2, mixed with the even background ink of 48 x 48 pixels."""
    found = score(Slant(), brightness * blob(lean=lean, x0=x0, y0=y0), ["a"]).item()
    assert found == pytest.approx(lean, abs=2e-3)
    mass, even = brightness * 2.0 * math.pi * 2.0 * 4.0, BACKGROUND_INK * 48.0**2
    share = mass / (mass + even)
    covariance = share * lean * 16.0 + share * (1.0 - share) * x0 * y0
    variance = share * 16.0 + (1.0 - share) * (48.0**2 - 1.0) / 12.0 + share * (1.0 - share) * y0**2
    assert found == pytest.approx(covariance / variance, abs=5e-5)


def test_slant_signs_and_edges() -> None:
    rising = torch.zeros(1, 3, 9, 9, dtype=torch.float64)
    for row in range(9):
        rising[0, :, row, 8 - row] = 1.0
    assert score(Slant(), rising, ["a"]).item() == pytest.approx(1.0, abs=1e-4)
    assert score(Slant(), rising.flip(-1), ["a"]).item() == pytest.approx(-1.0, abs=1e-4)
    black = torch.zeros(1, 3, 9, 9, requires_grad=True)
    value = score(Slant(), black, ["a"], gradient=True)
    assert abs(value.item()) < 1e-6
    assert torch.isfinite(torch.autograd.grad(value.sum(), black)[0]).all()


def test_stroke_weight_is_the_mean() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    pixels[1, :, :2] = 0.5
    assert score(StrokeWeight(), pixels, ["a", "b"]).tolist() == [0.0, 0.25]
    digits = load_digits_split("train")
    ink = score(StrokeWeight(), digits.pixels, ["a"] * len(digits))
    assert ink[digits.weights == 1].mean() > ink[digits.weights == 0].mean() + 0.02


def test_gradients_are_exact() -> None:
    pixels = (0.2 + 0.6 * torch.rand(2, 3, 5, 6, dtype=torch.float64)).requires_grad_()
    for scorer in (Slant(), StrokeWeight()):
        assert torch.autograd.gradcheck(lambda x, s=scorer: score(s, x, ["a", "b"], gradient=True), (pixels,))


@pytest.mark.slow
def test_log_probability_is_that_of_the_prompted_digit(trained, classifier_folder) -> None:
    scorer = load_digit_log_probability(classifier_folder)
    digits = load_digits_split("test")
    right = [caption(int(label), weight=None, phrasing=0) for label in digits.labels]
    wrong = [caption((int(label) + 1) % 10, weight=1, phrasing=2) for label in digits.labels]
    found = score(scorer, digits.pixels, right, chunk=100)
    logits = trained[0](digits.pixels)
    expected = logits.log_softmax(dim=1)[torch.arange(500), digits.labels]
    assert (found - expected).abs().max() < 1e-5
    assert found.mean() > -0.5
    assert score(scorer, digits.pixels, wrong).mean() < -3.0
    every = torch.stack(
        [score(scorer, digits.pixels[:4], [caption(d, weight=None, phrasing=1)] * 4) for d in range(10)]
    )
    assert (every.exp().sum(dim=0) - 1.0).abs().max() < 1e-5


def test_climbing_the_log_probability_turns_one_digit_into_another(trained) -> None:
    scorer = DigitLogProbability(trained[0])
    pixels = load_digits_split("test").pixels[:8].clone()
    prompts = ["the digit four"] * 8
    before = score(scorer, pixels, prompts).mean()
    for _ in range(20):
        leaf = pixels.requires_grad_()
        (gradient,) = torch.autograd.grad(score(scorer, leaf, prompts, gradient=True).sum(), leaf)
        pixels = (leaf + 0.05 * gradient.sign()).detach().clamp(0.0, 1.0)
    assert score(scorer, pixels, prompts).mean() > max(before + 2.0, math.log(0.8))


def test_mistakes(tmp_path, trained) -> None:
    with pytest.raises(ValueError, match="no classifier weights"):
        load_digit_log_probability(tmp_path)
    with pytest.raises(ValueError, match="must name exactly one digit"):
        score(DigitLogProbability(trained[0]), torch.rand(1, 3, 32, 32), ["a cat"])
