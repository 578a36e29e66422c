"""Scorers of a video run: those of clips of moving digits, and all others by their names, lifted to clips.

A window of a stream is a clip of any number of frames, and a digit turns at walls: the direction that a caption names
holds for the beginning of a stream alone, its axis and its speed for all of it.

Shapes: B clips, T pixel frames, pixels [B, 3, T, 32, 32] in [0, 1], scores [B].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fewstep.core.embedded.digits import label_of_prompt
from fewstep.core.embedded.video_clips import CLIP_FRAMES, SPEEDS, direction_of_prompt, speed_of_prompt
from fewstep.dmd.reward_config import ScorerConfig
from fewstep.evaluation.reward_choice import SCORERS, ScorerChoice, make_scorer
from fewstep.evaluation.scorer import Scorer, ScorerCard
from fewstep.evaluation.scorers_frames import FrameScore
from fewstep.evaluation.video_judges import ClipLogits, FrameJudge, VideoJudges, clip_logits, frame_logits, load_judges
from fewstep.evaluation.video_measures import light_centres

Question = Literal["direction", "axis", "speed"]
JUDGED = ("clip_digit", "clip_direction", "clip_axis", "clip_speed")
MEASURED = ("clip_light", "clip_motion_error")


class ClipDigit:
    """Log-probability, in nats, of the prompt's digit, a mean over all frames; 0 is certain."""

    def __init__(self, judge: FrameJudge, *, weights: str | None = None) -> None:
        self.judge = judge
        self.card = ScorerCard("clip_digit", -math.inf, 0.0, needs_video=True, weights=weights)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        labels = torch.tensor([label_of_prompt(prompt) for prompt in prompts], device=pixels.device)
        said = frame_logits(self.judge, pixels).log_softmax(dim=-1)  # [B, T, 10]
        return said[torch.arange(len(labels), device=pixels.device), :, labels].mean(dim=1)


class ClipMotion:
    """Log-probability, in nats, that the clip moves as the prompt says; 0 is certain.

    "direction" asks the first 25 frames; "axis" (horizontal or vertical) and "speed" ask pieces of 25 frames that cover
    the clip, and take their mean. Raises ValueError for a shorter clip.
    """

    def __init__(self, judges: VideoJudges, question: Question, *, weights: str | None = None) -> None:
        self.judge, self.question = judges.clip, question
        self.card = ScorerCard(f"clip_{question}", -math.inf, 0.0, needs_video=True, weights=weights)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        frames = pixels.shape[2]
        if frames < CLIP_FRAMES:
            raise ValueError(
                f"{self.card.name} judges {CLIP_FRAMES} frames, and the clips have {frames}: make window.chunks larger"
            )
        starts = [0] if self.question == "direction" else pieces(frames)
        said = [self._answers(clip_logits(self.judge, pixels[:, :, start:])) for start in starts]
        read = speed_of_prompt if self.question == "speed" else direction_of_prompt
        labels = torch.tensor([read(prompt) for prompt in prompts], device=pixels.device)
        if self.question == "axis":
            labels = labels // 2
        return torch.stack(said).mean(dim=0).gather(1, labels[:, None])[:, 0]

    def _answers(self, logits: ClipLogits) -> Tensor:
        """Log-probabilities of the answers, [B, 4] or [B, 2]."""
        if self.question == "speed":
            return logits.speeds.log_softmax(dim=1)
        directions = logits.directions.log_softmax(dim=1)
        # Left and right come before up and down. A sum of probabilities may round above 1.
        return directions if self.question == "direction" else directions.unflatten(1, (2, 2)).logsumexp(2).clamp(max=0)


class ClipLight:
    """Share of frames that have light: 1 minus `black_frames` of the evaluation. Prompts are not read."""

    card = ScorerCard("clip_light", 0.0, 1.0, needs_video=True)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return light_centres(pixels)[1].float().mean(dim=1)


class ClipMotionError:
    """How far the centre of light is from the prompt's speed: mean over steps |moved - speed|, pixels per frame.

    No network judges here. A step from or to a frame without light moves nothing.
    """

    card = ScorerCard("clip_motion_error", 0.0, higher_is_better=False, needs_video=True)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        centres, lit = light_centres(pixels)
        moved = centres.diff(dim=1).norm(dim=-1) * (lit[:, 1:] & lit[:, :-1])
        asked = [SPEEDS[speed_of_prompt(prompt)] for prompt in prompts]
        return (moved - moved.new_tensor(asked)[:, None]).abs().mean(dim=1)


def pieces(frames: int) -> list[int]:
    """Where pieces of 25 frames begin that cover a clip of at least as many; the last one may overlap."""
    starts = list(range(0, frames - CLIP_FRAMES + 1, CLIP_FRAMES))
    return starts if starts[-1] + CLIP_FRAMES == frames else [*starts, frames - CLIP_FRAMES]


def load_video_scorers(entries: Sequence[ScorerConfig], *, device: torch.device) -> tuple[Scorer, ...]:
    """The scorers of a configuration as scorers of clips. Raises ValueError that says what is missing or unknown."""
    return tuple(load_video_scorer(entry, device=device) for entry in entries)


def load_video_scorer(entry: ScorerConfig, *, device: torch.device) -> Scorer:
    """One scorer; one of pictures counts by the mean of its frames, or of the best share `frames` of them."""
    if entry.name in (*JUDGED, *MEASURED):
        if entry.frames is not None or (entry.weights is None) != (entry.name in MEASURED):
            judges = "a folder of judges as weights, such as assets/digits_video/judges"
            needs = "no weights" if entry.name in MEASURED else judges
            raise ValueError(f"scorer {entry.name} takes {needs}, and no share of frames: it judges clips")
        return _digit_scorer(entry, device)
    if entry.name not in SCORERS:
        raise ValueError(f"scorer is {entry.name!r}; use one of {', '.join((*JUDGED, *MEASURED, *SCORERS))}")
    choice = ScorerChoice(entry.name, entry.weights, entry.clip, entry.model, entry.frames)
    scorer = make_scorer(choice, device=str(device))
    return scorer if scorer.card.needs_video else FrameScore(scorer)


def _digit_scorer(entry: ScorerConfig, device: torch.device) -> Scorer:
    if entry.name == "clip_light":
        return ClipLight()
    if entry.name == "clip_motion_error":
        return ClipMotionError()
    judges = load_judges(entry.weights or "")
    judges.frame.to(device)
    judges.clip.to(device)
    match entry.name:
        case "clip_digit":
            return ClipDigit(judges.frame, weights=entry.weights)
        case "clip_direction":
            return ClipMotion(judges, "direction", weights=entry.weights)
        case "clip_axis":
            return ClipMotion(judges, "axis", weights=entry.weights)
        case _:
            return ClipMotion(judges, "speed", weights=entry.weights)
