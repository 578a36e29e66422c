"""The one table of scorers: from a name in a configuration or on a command line to the scorer with its weights.

And the judge of a validation, which may hold samples against the embedded digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fewstep.embedded.digits.held_out_classifier import load_held_out
from fewstep.embedded.digits.reference import judge_of
from fewstep.embedded.digits.scorers import Slant, StrokeWeight, load_digit_log_probability
from fewstep.embedded.moving_digits.scorers import ClipLight, ClipMotionError, load_clip_digit, load_clip_motion
from fewstep.evaluation.choice import Choice
from fewstep.evaluation.judge import Judge
from fewstep.evaluation.scorers.clip import load_aesthetic, load_clip_score, load_hpsv2, load_pickscore
from fewstep.evaluation.scorers.frames import FrameScore
from fewstep.evaluation.scorers.prefix import PrefixedScorer
from fewstep.evaluation.scorers.remote import RemoteScorer
from fewstep.evaluation.scorers.scorer import Scorer
from fewstep.evaluation.scorers.settings import ScorerConfig
from fewstep.evaluation.systems import SHOWN_SIDE, OwnReference, parse_split
from fewstep.evaluation.validation import ValidationConfig

SHIPPED_JUDGES = "a folder of judges as weights, such as assets/digits_video/judges"


@dataclass(frozen=True)
class ScorerChoice:
    """Which scorer, and where its weights are.

    `weights` is a folder or .safetensors file, or the address of a remote scorer. `clip` is the CLIP under the
    aesthetic head, `model` the open_clip architecture of a bare file. `frames` lifts a picture scorer to clips: the
    share of the best frames whose mean counts, 1 for all; None for scorers that judge clips themselves.
    Raises ValueError for an unknown name, and for weights that are missing or not wanted.
    """

    name: str
    weights: str | None = None
    clip: str | None = None
    model: str | None = None
    frames: float | None = None

    def __post_init__(self) -> None:
        row = SCORERS.get(self.name)
        if row is None:
            raise ValueError(f"scorer is {self.name!r}; use one of {', '.join(SCORERS)}")
        if row.judges_clips and (self.frames is not None or (self.weights is None) == row.has_weights):
            needs = SHIPPED_JUDGES if row.has_weights else "no weights"
            raise ValueError(f"scorer {self.name} takes {needs}, and no share of frames: it judges clips")
        if not row.has_weights and self.weights is not None:
            raise ValueError(f"scorer {self.name} has no weights; leave weights {self.weights!r} out")
        if row.has_weights and self.weights is None:
            raise ValueError(f"scorer {self.name} needs weights; docs/rewards.md says where they come from")
        if (self.clip is not None) != row.needs_clip:
            raise ValueError(f"scorer {self.name} with clip {self.clip!r}; clip is for 'aesthetic', which needs it")
        if self.model is not None and not row.takes_model:
            takers = ", ".join(name for name, other in SCORERS.items() if other.takes_model)
            raise ValueError(f"scorer {self.name} with model {self.model!r}; model is for {takers}, leave it out")

    @property
    def folder(self) -> str:
        return self.weights or ""

    def architecture(self, name: str = "model") -> dict[str, str]:
        """The architecture as an argument; empty where none is given, for each loader has a default of its own."""
        return {} if self.model is None else {name: self.model}


Load = Callable[[ScorerChoice, str], Scorer]


@dataclass(frozen=True)
class ScorerRow:
    """How a scorer is loaded, from (choice, device), and what it is loaded from.

    `needs_clip` and `takes_model` are those of `ScorerChoice`; `judges_clips` belongs to those of the embedded clips.
    """

    load: Load
    has_weights: bool = True
    needs_clip: bool = False
    takes_model: bool = False
    judges_clips: bool = False


def _image_reward(choice: ScorerChoice, device: str) -> Scorer:
    # BLIP takes seconds to import.
    from fewstep.evaluation.scorers.blip import load_image_reward

    return load_image_reward(choice.folder, device=device)


def _hpsv3(choice: ScorerChoice, device: str) -> Scorer:
    # Qwen2-VL takes seconds to import.
    from fewstep.evaluation.scorers.qwen import load_hpsv3

    return load_hpsv3(choice.folder, device=device)


def _videoalign(choice: ScorerChoice, device: str) -> Scorer:
    from fewstep.evaluation.scorers.qwen import load_videoalign

    return load_videoalign(choice.folder, AXES[choice.name], device=device)


def _geneval(choice: ScorerChoice, device: str) -> Scorer:
    # Mask2Former takes seconds to import.
    from fewstep.evaluation.scorers.geneval import load_geneval

    return load_geneval(choice.folder, kind="score" if choice.name == "geneval" else "correct", device=device)


def _aesthetic(choice: ScorerChoice, device: str) -> Scorer:
    return load_aesthetic(choice.folder, clip=choice.clip or "", device=device, **choice.architecture("clip_model"))


# Axes of one model, which a list of scorers loads once.
AXES: dict[str, Literal["VQ", "MQ", "TA", "overall"]] = {
    "videoalign_vq": "VQ",
    "videoalign_mq": "MQ",
    "videoalign_ta": "TA",
    "videoalign_overall": "overall",
}

SCORERS: dict[str, ScorerRow] = {
    "stroke_weight": ScorerRow(lambda choice, device: StrokeWeight(), has_weights=False),
    "slant": ScorerRow(lambda choice, device: Slant(), has_weights=False),
    "digit_log_probability": ScorerRow(lambda choice, device: load_digit_log_probability(choice.folder, device=device)),
    "held_out_log_probability": ScorerRow(lambda choice, device: load_held_out(choice.folder, device=device)),
    "clip_score": ScorerRow(
        lambda c, device: load_clip_score(c.folder, device=device, **c.architecture()), takes_model=True
    ),
    "hpsv2": ScorerRow(lambda c, device: load_hpsv2(c.folder, device=device, **c.architecture()), takes_model=True),
    "aesthetic": ScorerRow(_aesthetic, needs_clip=True, takes_model=True),
    "pickscore": ScorerRow(lambda choice, device: load_pickscore(choice.folder, device=device)),
    "image_reward": ScorerRow(_image_reward),
    "hpsv3": ScorerRow(_hpsv3),
    **{name: ScorerRow(_videoalign) for name in AXES},
    "geneval": ScorerRow(_geneval),
    "geneval_correct": ScorerRow(_geneval),
    "remote": ScorerRow(lambda choice, device: RemoteScorer(choice.folder)),
    "clip_digit": ScorerRow(lambda c, device: load_clip_digit(c.folder, device=device), judges_clips=True),
    "clip_direction": ScorerRow(
        lambda c, device: load_clip_motion(c.folder, "direction", device=device), judges_clips=True
    ),
    "clip_axis": ScorerRow(lambda c, device: load_clip_motion(c.folder, "axis", device=device), judges_clips=True),
    "clip_speed": ScorerRow(lambda c, device: load_clip_motion(c.folder, "speed", device=device), judges_clips=True),
    "clip_light": ScorerRow(lambda choice, device: ClipLight(), has_weights=False, judges_clips=True),
    "clip_motion_error": ScorerRow(lambda choice, device: ClipMotionError(), has_weights=False, judges_clips=True),
}


def make_scorer(choice: ScorerChoice, *, device: str = "cpu") -> Scorer:
    """The scorer of a choice, loaded. Raises ValueError that says what is missing, before anything is trained."""
    scorer = SCORERS[choice.name].load(choice, device)
    return scorer if choice.frames is None else FrameScore(scorer, share=choice.frames)


def load_scorers(entries: Sequence[ScorerConfig], *, device: torch.device, videos: bool = False) -> tuple[Scorer, ...]:
    """The scorers of a configuration; for `videos` those of pictures count by the mean of their frames.

    Raises ValueError that says what is missing or unknown.
    """
    found: list[Scorer] = []
    models: dict[str, Any] = {}
    for entry in entries:
        choice = ScorerChoice(entry.name, entry.weights, entry.clip, entry.model, entry.frames)
        axis, shared = AXES.get(choice.name), models.get(choice.folder)
        try:
            scorer = make_scorer(choice, device=str(device)) if axis is None or shared is None else shared.of_axis(axis)
            if axis is not None:
                models[choice.folder] = scorer
        except RuntimeError as error:
            raise ValueError(f"scorer {entry.name} cannot be reached: {error}") from error
        found.append(scorer if entry.prompt_prefix is None else PrefixedScorer(scorer, entry.prompt_prefix))
    return tuple(FrameScore(each) if videos and not each.card.needs_video else each for each in found)


def load_judge(config: ValidationConfig, prompts: str, *, device: torch.device) -> Judge:
    """The judge of a validation, on the device, without intervals; `prompts` is the run's file, where it has no own.

    Raises ValueError that says what is missing or unknown.
    """
    choice = Choice(config.measures, config.weights, config.protocol, device=str(device), repetitions=0)
    split = parse_split(config.reference)
    own = OwnReference(config.prompts or prompts, config.reference, SHOWN_SIDE, SHOWN_SIDE)
    scorers = load_scorers(config.scorers, device=device)
    return judge_of(own if split is None else split, choice, classifier=config.classifier or "", scorers=scorers)
