"""The checked call refuses what would train on nonsense, and hands gradients and numbers through."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.evaluation.scorers.scorer import ScorerCard, reward_of, score


class Formula:
    """Mean brightness times a factor per sample; with `broken`, that sample's score is NaN."""

    def __init__(self, card: ScorerCard, *, factor: float = 1.0, broken: int | None = None, shape: int = 1) -> None:
        self.card, self.factor, self.broken, self.shape = card, factor, broken, shape

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        values = self.factor * pixels.flatten(1).mean(dim=1)
        if self.broken is not None:
            marks = torch.tensor([float(prompt) for prompt in prompts]) == self.broken
            values = torch.where(marks, torch.nan, values)
        return values if self.shape == 1 else values[:, None]


def card(**changes) -> ScorerCard:
    return ScorerCard(**{"name": "ink", "low": 0.0, "high": 1.0, "differentiable": True, **changes})


def pixels_of(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 5).contiguous()


PROMPTS = ["0", "1", "2", "3", "4"]
PIXELS = pixels_of(0.1, 0.2, 0.3, 0.4, 0.5)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 9])
def test_scores_do_not_depend_on_the_chunk(chunk) -> None:
    found = score(Formula(card()), PIXELS, PROMPTS, chunk=chunk)
    assert found.dtype == torch.float32
    assert (found - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])).abs().max() < 1e-7


def test_gradient_reaches_the_pixels_only_when_asked() -> None:
    pixels = PIXELS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(Formula(card()), pixels, PROMPTS, gradient=True, chunk=2).sum(), pixels)
    assert (gradient - 1.0 / 60.0).abs().max() < 1e-8
    assert not score(Formula(card()), pixels, PROMPTS).requires_grad
    with pytest.raises(ValueError, match="ink is not differentiable"):
        score(Formula(card(differentiable=False)), pixels, PROMPTS, gradient=True)


def test_double_precision_stays_and_half_is_widened() -> None:
    assert score(Formula(card()), PIXELS.double(), PROMPTS).dtype == torch.float64
    assert score(Formula(card()), PIXELS.half(), PROMPTS).dtype == torch.float32


@pytest.mark.parametrize(
    ("scorer", "pixels", "prompts", "message"),
    [
        (Formula(card()), PIXELS[:, :1], PROMPTS, r"ink takes pixels \[B, 3, H, W\], given \(5, 1, 4, 5\)"),
        (Formula(card()), PIXELS[:, :, None], PROMPTS, r"given \(5, 3, 1, 4, 5\)"),
        (Formula(card(needs_video=True)), PIXELS, PROMPTS, r"\[B, 3, F, H, W\], given \(5, 3, 4, 5\)"),
        (Formula(card()), PIXELS[:0], [], r"given \(0, 3, 4, 5\)"),
        (Formula(card()), PIXELS, PROMPTS[:4], "4 prompts for 5 samples"),
        (Formula(card()), PIXELS[:1], "0", "one string for 1 samples"),
        (Formula(card()), (PIXELS * 255).to(torch.uint8), PROMPTS, r"pixels are torch\.uint8"),
        (Formula(card()), PIXELS * 2.0 - 1.0, PROMPTS, r"samples \[0, 1, 2, 3\] are outside \[0, 1\] \(-0\.8"),
        (Formula(card()), PIXELS * 255.0, PROMPTS, r"outside \[0, 1\] \(25\.5 \.\. 128\)"),
        (Formula(card()), pixels_of(0.1, math.nan, 0.2, 0.3, 0.4), PROMPTS, r"pixels of samples \[1\] are not finite"),
        (Formula(card(), broken=3), PIXELS, PROMPTS, r"ink: scores of samples \[3\] are not finite"),
        (Formula(card(), factor=3.0), PIXELS, PROMPTS, r"scores of samples \[3\] are outside its range 0\.0 \.\. 1"),
        (Formula(card(), shape=2), PIXELS, PROMPTS, r"ink answered \(2, 1\) for 2 samples; expected \(2,\)"),
    ],
)
def test_mistakes_name_the_scorer_and_the_samples(scorer, pixels, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        score(scorer, pixels, prompts, chunk=2)


def test_a_chunk_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="chunk is 0"):
        score(Formula(card()), PIXELS, PROMPTS, chunk=0)


def test_rounding_at_the_edge_of_the_range_is_allowed() -> None:
    found = score(Formula(card(), factor=1.008), pixels_of(1.0), ["0"])
    assert found.item() == pytest.approx(1.008)
    assert score(Formula(card(low=-math.inf, high=math.inf), factor=1e6), pixels_of(1.0), ["0"]).item() == 1e6


def test_direction_and_declarations() -> None:
    scores = torch.tensor([1.0, -2.0])
    assert reward_of(card(), scores).tolist() == [1.0, -2.0]
    assert reward_of(card(higher_is_better=False), scores).tolist() == [-1.0, 2.0]
    with pytest.raises(ValueError, match="no name"):
        card(name=" ")
    with pytest.raises(ValueError, match=r"range 1\.0 \.\. 1\.0"):
        card(low=1.0)
