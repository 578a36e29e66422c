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
from fewstep.evaluation.accuracy import AccuracyResult, DiversityResult, class_accuracy, within_class_diversity
from fewstep.evaluation.evaluate import Judge, build_judge, with_clip
from fewstep.evaluation.fid import ReferenceFeatures, extract_features
from fewstep.evaluation.inception import InceptionFeatures, load_inception_features
from fewstep.evaluation.references import Reference
from fewstep.evaluation.systems import OwnReference, require_samples

SPLITS = ("test", "train")
# After so many indices `balanced_prompt` repeats: 10 digits, 4 turns of the stroke weight, all phrasings.
DIGIT_PROMPTS = 40 * len(PHRASINGS)


@dataclass(frozen=True)
class DigitClasses:
    """A classifier of digits, and what it says of the real ones: their accuracy and their diversity."""

    classifier: DigitsClassifier
    accuracy: float
    diversity: float

    def score(
        self, pixels: Tensor, features: Tensor, *, prompts: Sequence[str]
    ) -> tuple[AccuracyResult, DiversityResult]:
        """Scores of pixels [N, 3, 32, 32] and their features [N, D], which were drawn for `prompts`."""
        labels = torch.tensor([label_of_prompt(prompt) for prompt in prompts])
        accuracy, per_class = class_accuracy(self.classifier, pixels, labels=labels)
        return (
            AccuracyResult(accuracy, len(pixels), self.accuracy, tuple(per_class)),
            DiversityResult(within_class_diversity(features, labels), self.diversity),
        )


def digits_reference(
    split: str, *, classifier: DigitsClassifier, extractor: DigitFeatures | InceptionFeatures
) -> Reference:
    """The digits of `split`, "test" or "train"; the other split measures the floor. Raises ValueError for another."""
    if split not in SPLITS:
        raise ValueError(f"reference is {split!r}; use one of {', '.join(SPLITS)}")
    real = load_digits_split("test" if split == "test" else "train")
    other = load_digits_split("train" if split == "test" else "test")
    rows = extract_features(extractor, real.pixels)
    accuracy, _ = class_accuracy(classifier, real.pixels, labels=real.labels)
    return Reference(
        prompts=tuple(balanced_prompt(index) for index in range(DIGIT_PROMPTS)),
        extractor=extractor,
        real=ReferenceFeatures(
            split=split,
            features=rows,
            floor_pool=extract_features(extractor, other.pixels),
            floor_labels=other.labels,
            feature_extractor=extractor.name,
        ),
        # One column per digit, without a stroke weight.
        grid_prompts=tuple(caption(digit, weight=None, phrasing=0) for digit in range(10)),
        grid_pixels=torch.stack([real.pixels[real.labels == digit][0] for digit in range(10)]),
        classes=DigitClasses(classifier, accuracy, within_class_diversity(rows, real.labels)),
    )


def digits_judge(
    split: str,
    *,
    classifier: str | Path | DigitsClassifier,
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    clip_model: str | None = None,
) -> Judge:
    """A judge whose reference is the digits split "test" or "train".

    `inception` and `clip` are local weights (see `load_inception_features` and `load_clip_scorer`): the first takes the
    place of the classifier's features in FID, KID and diversity, the second adds the CLIP score.
    Raises ValueError for another split, and for missing weights.
    """
    network = classifier if isinstance(classifier, DigitsClassifier) else load_classifier(classifier)
    features = DigitFeatures(network) if inception is None else load_inception_features(inception)
    return with_clip(Judge(digits_reference(split, classifier=network, extractor=features)), clip, model=clip_model)


def evaluation_prompts(samples: int) -> list[str]:
    """The prompts of samples 0 ... samples - 1 of the digits, which follow the captions of the data.

    Raises ValueError for too few samples to hold every digit twice.
    """
    require_samples(samples)
    return [balanced_prompt(index) for index in range(samples)]


def judge_of(
    real: str | OwnReference,
    *,
    classifier: str | Path,
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    clip_model: str | None = None,
) -> Judge:
    """A judge by the user's own pictures where they are given, else by a split of the digits.

    Raises ValueError as `build_judge` and `digits_judge`.
    """
    if isinstance(real, OwnReference):
        return build_judge(real, inception=inception, clip=clip, clip_model=clip_model)
    return digits_judge(real, classifier=classifier, inception=inception, clip=clip, clip_model=clip_model)
