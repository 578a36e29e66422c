"""From the name of a scorer, as configurations and the command line give it, to the scorer with its weights."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.evaluation.remote_scorer import RemoteScorer
from fewstep.evaluation.reward_digits import Slant, StrokeWeight, load_digit_log_probability
from fewstep.evaluation.scorer import Scorer
from fewstep.evaluation.scorers_clip import load_aesthetic, load_clip_score, load_hpsv2, load_pickscore
from fewstep.evaluation.scorers_frames import FrameScore
from fewstep.evaluation.scorers_held_out import load_held_out

WITHOUT_WEIGHTS = ("stroke_weight", "slant")
SCORERS = (
    *WITHOUT_WEIGHTS,
    "digit_log_probability",
    "held_out_log_probability",
    "clip_score",
    "hpsv2",
    "aesthetic",
    "pickscore",
    "image_reward",
    "hpsv3",
    "videoalign_vq",
    "videoalign_mq",
    "videoalign_ta",
    "videoalign_overall",
    "remote",
)


@dataclass(frozen=True)
class ScorerChoice:
    """Which scorer, and where its weights are.

    `weights` is a folder or .safetensors file, or the address of a remote scorer. `clip` is the CLIP under the
    aesthetic head, `model` the open_clip architecture of a bare file. `frames` lifts a picture scorer to clips: the
    share of the best frames whose mean counts, 1 for all; for VideoAlign None.
    Raises ValueError for an unknown name, and for weights that are missing or not wanted.
    """

    name: str
    weights: str | None = None
    clip: str | None = None
    model: str | None = None
    frames: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SCORERS:
            raise ValueError(f"scorer is {self.name!r}; use one of {', '.join(SCORERS)}")
        if self.name in WITHOUT_WEIGHTS and self.weights is not None:
            raise ValueError(f"scorer {self.name} has no weights; leave weights {self.weights!r} out")
        if self.name not in WITHOUT_WEIGHTS and self.weights is None:
            raise ValueError(f"scorer {self.name} needs weights; docs/rewards.md says where they come from")
        if (self.clip is not None) != (self.name == "aesthetic"):
            raise ValueError(f"scorer {self.name} with clip {self.clip!r}; clip is for 'aesthetic', which needs it")


def make_scorer(choice: ScorerChoice, *, device: str = "cpu") -> Scorer:
    """The scorer of a choice, loaded. Raises ValueError that says what is missing, before anything is trained."""
    scorer = _load(choice, device)
    return scorer if choice.frames is None else FrameScore(scorer, share=choice.frames)


def _load(choice: ScorerChoice, device: str) -> Scorer:
    weights = choice.weights or ""
    # Each loader has defaults of its own for the architecture.
    architecture = {} if choice.model is None else {"model": choice.model}
    match choice.name:
        case "stroke_weight":
            return StrokeWeight()
        case "slant":
            return Slant()
        case "digit_log_probability":
            return load_digit_log_probability(weights, device=device)
        case "held_out_log_probability":
            return load_held_out(weights, device=device)
        case "clip_score":
            return load_clip_score(weights, device=device, **architecture)
        case "hpsv2":
            return load_hpsv2(weights, device=device, **architecture)
        case "aesthetic":
            clip_model = {} if choice.model is None else {"clip_model": choice.model}
            return load_aesthetic(weights, clip=choice.clip or "", device=device, **clip_model)
        case "pickscore":
            return load_pickscore(weights, device=device)
        case "remote":
            return RemoteScorer(weights)
        case _:
            return _load_heavy(choice.name, weights, device)


def _load_heavy(name: str, weights: str, device: str) -> Scorer:
    # BLIP and Qwen2-VL take seconds to import.
    from fewstep.evaluation.scorers_blip import load_image_reward
    from fewstep.evaluation.scorers_qwen import load_hpsv3, load_videoalign

    match name:
        case "image_reward":
            return load_image_reward(weights, device=device)
        case "hpsv3":
            return load_hpsv3(weights, device=device)
        case "videoalign_vq":
            return load_videoalign(weights, "VQ", device=device)
        case "videoalign_mq":
            return load_videoalign(weights, "MQ", device=device)
        case "videoalign_ta":
            return load_videoalign(weights, "TA", device=device)
        case _:
            return load_videoalign(weights, "overall", device=device)
