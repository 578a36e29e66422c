"""Handwritten digits that ship inside scikit-learn: images, captions and a fixed split.

Shapes: N images, pixels [N, 3, 32, 32] in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import Tensor

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHT_WORDS = ("thin", "bold")
IMAGE_SIZE = 32
TEST_SIZE = 500
SPLIT_SEED = 20

# {w} is a stroke weight and a space, or nothing.
PHRASINGS = ("the {w}digit {d}", "a {w}{d}", "a {w}handwritten {d}", "the {w}number {d}")


@dataclass(frozen=True)
class DigitImages:
    """One split: pixels [N, 3, 32, 32] in [0, 1], labels [N] in 0..9, weights [N] (0 thin, 1 bold)."""

    pixels: Tensor
    labels: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]


def load_digits_split(split: Literal["train", "test"]) -> DigitImages:
    """The 1,297 training or 500 test digits, upsampled from 8x8 to 32x32 (bicubic, clamped to [0, 1]).

    The split is a fixed permutation with 50 test images of each digit. A digit is bold when it has more ink than the
    median training digit of its class.
    Raises ValueError for another split name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; use 'train' or 'test'")
    raw = cast(Bunch, load_digits())
    small = torch.from_numpy(raw.images).float() / 16.0  # [N, 8, 8]
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    # Stratified: prompts cycle through the digits, so the test split holds each of them equally often.
    held_out = torch.cat([order[labels[order] == digit][: TEST_SIZE // 10] for digit in range(10)])
    is_test = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, held_out, True)
    train_rows, test_rows = order[~is_test[order]], order[is_test[order]]

    ink = small.mean(dim=(1, 2))
    medians = torch.stack([ink[train_rows][labels[train_rows] == digit].median() for digit in range(10)])
    weights = (ink > medians[labels]).long()

    rows = train_rows if split == "train" else test_rows
    pixels = F.interpolate(small[rows, None], size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    pixels = pixels.clamp(0.0, 1.0).expand(-1, 3, -1, -1).contiguous()
    return DigitImages(pixels=pixels, labels=labels[rows], weights=weights[rows])


def caption(digit: int, *, weight: int | None, phrasing: int) -> str:
    """The caption of a digit; `weight` is 0 (thin), 1 (bold) or None (not said)."""
    word = "" if weight is None else WEIGHT_WORDS[weight] + " "
    return PHRASINGS[phrasing].format(w=word, d=DIGIT_WORDS[digit])


def all_captions() -> list[str]:
    """Every caption, 10 digits x 3 weights (thin, bold, not said) x 4 phrasings, digit fastest."""
    return [
        caption(digit, weight=weight, phrasing=phrasing)
        for phrasing in range(len(PHRASINGS))
        for weight in (None, 0, 1)
        for digit in range(10)
    ]


def balanced_prompt(index: int) -> str:
    """The prompt of sample `index` in an evaluation whose prompts follow the data: digits cycle fastest, half of the
    captions say no stroke weight, a quarter each say thin and bold, phrasings cycle slowest.
    """
    digit, rest = index % 10, index // 10
    weight = (None, 0, None, 1)[rest % 4]
    return caption(digit, weight=weight, phrasing=(rest // 4) % len(PHRASINGS))


def label_of_prompt(prompt: str) -> int:
    """The digit that a caption names. Raises ValueError when it names none or several."""
    found = [digit for digit, word in enumerate(DIGIT_WORDS) if word in prompt.lower().split()]
    if len(found) != 1:
        raise ValueError(f"prompt {prompt!r} must name exactly one digit of {', '.join(DIGIT_WORDS)}")
    return found[0]


def weight_of_prompt(prompt: str) -> int | None:
    """The stroke weight that a caption names: 0 thin, 1 bold, None when not said."""
    words = prompt.lower().split()
    return next((weight for weight, word in enumerate(WEIGHT_WORDS) if word in words), None)
