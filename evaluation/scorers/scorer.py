"""What a scorer is, and the checked call that rewards and metrics go through.

A scorer gives each picture or clip one number. The same object is a metric (without gradient) and, when it is
differentiable, a reward whose gradient reaches the pixels.

Shapes: B samples, pixels [B, 3, H, W] or [B, 3, F, H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Decoders and resizing overshoot by rounding alone; a wrong convention ([-1, 1] or 0..255) is far outside.
PIXEL_TOLERANCE = 1e-3
# Of the width of the declared range: a cosine of half precision may read 1.004.
RANGE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class ScorerCard:
    """What a scorer declares about itself.

    `low` and `high` are the range of its scores (infinite where there is no bound), `weights` the file or folder it was
    loaded from, None when it needs none. A scorer that `needs_video` takes [B, 3, F, H, W], any other [B, 3, H, W].
    Raises ValueError for a blank name or an empty range.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    higher_is_better: bool = True
    differentiable: bool = False
    needs_video: bool = False
    weights: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("a scorer has no name; give it one, messages and logs need it")
        if not self.low < self.high:
            raise ValueError(f"scorer {self.name} declares the range {self.low} .. {self.high}; low must be below high")


class Scorer(Protocol):
    """Pixels [B, 3, H, W] (or [B, 3, F, H, W]) in [0, 1] and B prompts to B scores.

    The score of a sample does not depend on the other samples of its batch. A sample that cannot be scored is an
    exception or a NaN, never a number that stands for failure.
    """

    @property
    def card(self) -> ScorerCard: ...

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor: ...


def score(
    scorer: Scorer, pixels: Tensor, prompts: list[str], *, gradient: bool = False, chunk: int | None = None
) -> Tensor:
    """Checked scores [B] in fp32 (fp64 stays), on the device of the scorer's answer.

    With `gradient` the scores carry the graph to the pixels. `chunk` scores that many samples at a time; the scores are
    the same.

    Raises:
        ValueError: pixels are not [B, 3, (F,) H, W] in [0, 1], prompts are not B, a gradient is asked of a scorer that
            has none, or the scorer answers with another shape, with numbers that are not finite or outside its range.
    """
    card = scorer.card
    _check_input(card, pixels, prompts)
    if gradient and not card.differentiable:
        raise ValueError(f"scorer {card.name} is not differentiable; use its scores as advantages, not as a loss")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; use at least 1, or None for the whole batch")
    size = chunk or len(prompts)
    parts = []
    with torch.set_grad_enabled(gradient):
        for start in range(0, len(prompts), size):
            values = scorer(pixels[start : start + size], prompts[start : start + size])
            parts.append(_checked_answer(card, values, count=min(size, len(prompts) - start), start=start))
    return torch.cat(parts)


def require_prompts(scorers: Sequence[Scorer], prompts: Sequence[str]) -> None:
    """Ask scorers that know certain prompts alone whether these are among them. Raises ValueError that names one."""
    for scorer in scorers:
        check = getattr(scorer, "require_prompts", None)
        if check is not None:
            check(prompts)


def reward_of(card: ScorerCard, scores: Tensor) -> Tensor:
    """Scores with the sign that makes higher better."""
    return scores if card.higher_is_better else -scores


def _check_input(card: ScorerCard, pixels: Tensor, prompts: list[str]) -> None:
    expected, dimensions = ("[B, 3, F, H, W]", 5) if card.needs_video else ("[B, 3, H, W]", 4)
    if pixels.ndim != dimensions or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(f"scorer {card.name} takes pixels {expected}, given {tuple(pixels.shape)}")
    if isinstance(prompts, str) or len(prompts) != len(pixels):
        given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"scorer {card.name}: {given} for {len(pixels)} samples; give a list of one prompt per sample")
    if not pixels.dtype.is_floating_point:
        raise ValueError(f"scorer {card.name}: pixels are {pixels.dtype}; give floating numbers in [0, 1]")
    with torch.no_grad():
        flat = pixels.detach().flatten(1)
        finite = torch.isfinite(flat).all(dim=1)
        if not bool(finite.all()):
            raise ValueError(f"scorer {card.name}: pixels of samples {_rows(~finite)} are not finite")
        outside = (flat.amin(dim=1) < -PIXEL_TOLERANCE) | (flat.amax(dim=1) > 1.0 + PIXEL_TOLERANCE)
    if bool(outside.any()):
        low, high = flat.min().item(), flat.max().item()
        raise ValueError(
            f"scorer {card.name}: pixels of samples {_rows(outside)} are outside [0, 1] ({low:.3g} .. {high:.3g}); "
            "decode to [0, 1] first"
        )


def _checked_answer(card: ScorerCard, values: Tensor, *, count: int, start: int) -> Tensor:
    if tuple(values.shape) != (count,):
        raise ValueError(f"scorer {card.name} answered {tuple(values.shape)} for {count} samples; expected ({count},)")
    values = values if values.dtype == torch.float64 else values.float()
    finite = torch.isfinite(values.detach())
    if not bool(finite.all()):
        raise ValueError(f"scorer {card.name}: scores of samples {_rows(~finite, start)} are not finite")
    width = card.high - card.low
    slack = RANGE_TOLERANCE * width if math.isfinite(width) else 0.0
    outside = (values.detach() < card.low - slack) | (values.detach() > card.high + slack)
    if bool(outside.any()):
        raise ValueError(
            f"scorer {card.name}: scores of samples {_rows(outside, start)} are outside its range "
            f"{card.low} .. {card.high}; they reach {values.min().item():.4g} .. {values.max().item():.4g}"
        )
    return values


def _rows(mask: Tensor, start: int = 0) -> list[int]:
    return [start + row for row in mask.nonzero()[:, 0].tolist()]
