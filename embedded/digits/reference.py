"""The digits as what generated images are asked for and held against: prompts, real pictures and a classifier.

Shapes: pixels [N, 3, 32, 32] in [0, 1], labels [N], features [N, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.embedded.digits.classifier import DigitFeatures, DigitsClassifier, load_classifier
from fewstep.embedded.digits.images import PHRASINGS, balanced_prompt, caption, label_of_prompt, load_digits_split
from fewstep.evaluation.accuracy import PairDistances, class_accuracy
from fewstep.evaluation.choice import WEIGHTS_OF, Choice, load_extractors, own_judge
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.measures.features import Extractor, extract_features
from fewstep.evaluation.references import Reference, ReferenceFeatures
from fewstep.evaluation.scorers.scorer import Scorer, require_prompts
from fewstep.evaluation.systems import SPLITS, OwnReference, require_samples

# After so many indices `balanced_prompt` repeats: 10 digits, 4 turns of the stroke weight, all phrasings.
DIGIT_PROMPTS = 40 * len(PHRASINGS)
DEFAULT_METRICS = ("fid", "kid", "classes")


@dataclass(frozen=True)
class DigitClasses:
    """A classifier of digits, and what it says of the real ones: their accuracy and their diversity."""

    classifier: DigitsClassifier
    accuracy: float
    diversity: float

    def labels(self, prompts: Sequence[str]) -> Tensor:
        """The digit [N] that each prompt asks for."""
        return torch.tensor([label_of_prompt(prompt) for prompt in prompts])

    @torch.no_grad()
    def right(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """1 where the classifier sees that digit in the pixels [B, 3, 32, 32], else 0."""
        return (self.classifier(pixels).argmax(dim=1) == labels).double()


def digits_reference(split: str, *, classifier: DigitsClassifier, extractors: dict[str, Extractor]) -> Reference:
    """The digits of `split`, "test" or "train"; the other split measures the floor. Raises ValueError for another.

    The splits hold fixed shares of the digits, as the prompts do, so rows of a digit are exchangeable among themselves
    alone: they are the strata of KID and of all intervals.
    """
    if split not in SPLITS:
        raise ValueError(f"reference is {split!r}; use one of {', '.join(SPLITS)}")
    real = load_digits_split("test" if split == "test" else "train")
    other = load_digits_split("train" if split == "test" else "test")
    compared = {}
    for key, extractor in extractors.items():
        compared[key] = ReferenceFeatures.of_features(
            f"digits, {split} split",
            extract_features(extractor, real.pixels),
            source=extractor.name,
            labels=real.labels,
            floor_pool=extract_features(extractor, other.pixels),
            floor_labels=other.labels,
        )
    accuracy, _ = class_accuracy(classifier, real.pixels, labels=real.labels)
    rows = compared["image"].features
    assert rows is not None
    return Reference(
        f"digits, {split} split",
        prompts=tuple(balanced_prompt(index) for index in range(DIGIT_PROMPTS)),
        # One column per digit, without a stroke weight.
        grid_prompts=tuple(caption(digit, weight=None, phrasing=0) for digit in range(10)),
        grid_pixels=torch.stack([real.pixels[real.labels == digit][0] for digit in range(10)]),
        extractors=extractors,
        real=compared,
        classes=DigitClasses(classifier, accuracy, PairDistances.of(rows, real.labels).mean()),
    )


def digits_judge(
    split: str,
    *,
    classifier: str | Path | DigitsClassifier,
    choice: Choice | None = None,
    scorers: tuple[Scorer, ...] = (),
) -> Judge:
    """A judge whose reference is the digits split "test" or "train".

    Its pictures are compared by the classifier's features, or by Inception's where the choice brings their weights.
    Raises ValueError for another split, and for missing weights.
    """
    chosen = Choice(DEFAULT_METRICS, repetitions=0) if choice is None else choice
    network = classifier if isinstance(classifier, DigitsClassifier) else load_classifier(classifier)
    # Diversity needs the features of pictures whether or not a distance does.
    keys = dict.fromkeys(("image", *chosen.feature_keys()))
    wanted = [key for key in keys if key != "image" or WEIGHTS_OF["image"] in chosen.weights]
    extractors = load_extractors(chosen, keys=wanted)
    extractors.setdefault("image", DigitFeatures(network))
    reference = digits_reference(split, classifier=network, extractors=extractors)
    require_prompts(scorers, reference.prompts)
    return Judge(reference, chosen.metrics, scorers, chosen.repetitions)


def evaluation_prompts(samples: int) -> list[str]:
    """The prompts of samples 0 ... samples - 1 of the digits, which follow the captions of the data.

    Raises ValueError for too few samples to hold every digit twice.
    """
    require_samples(samples)
    return [balanced_prompt(index) for index in range(samples)]


def judge_of(
    real: str | OwnReference, choice: Choice, *, classifier: str | Path, scorers: tuple[Scorer, ...] = ()
) -> Judge:
    """A judge by the user's own pictures where they are given, else by a split of the digits.

    Raises ValueError as `own_judge` and `digits_judge`.
    """
    if isinstance(real, OwnReference):
        return own_judge(real, choice, scorers=scorers)
    return digits_judge(real, classifier=classifier, choice=choice, scorers=scorers)
