"""Scorers of clips of moving digits, for rewards and as held-out judges.

A window of a stream is a clip of any number of frames, and a digit turns at walls: the direction that a caption names
holds for the beginning of a stream alone, its axis and its speed for all of it.

Shapes: B clips, T pixel frames, pixels [B, 3, T, 32, 32] in [0, 1], scores [B].
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.moving_digits.clips import CLIP_FRAMES, SPEEDS, direction_of_prompt, speed_of_prompt
from fewstep.embedded.moving_digits.judges import (
    ClipLogits,
    FrameJudge,
    VideoJudges,
    clip_logits,
    frame_logits,
    load_judges,
)
from fewstep.embedded.moving_digits.measures import light_centres
from fewstep.evaluation.scorers.scorer import ScorerCard

Question = Literal["direction", "axis", "speed"]


class ClipDigit:
    """Log-probability, in nats, of the prompt's digit, a mean over all frames; 0 is certain."""

    def __init__(self, judge: FrameJudge, *, weights: str | None = None) -> None:
        self.judge = judge
        self.card = ScorerCard("clip_digit", -math.inf, 0.0, differentiable=True, needs_video=True, weights=weights)

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
        name = f"clip_{question}"
        self.card = ScorerCard(name, -math.inf, 0.0, differentiable=True, needs_video=True, weights=weights)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        frames = pixels.shape[2]
        if frames < CLIP_FRAMES:
            raise ValueError(
                f"{self.card.name} judges {CLIP_FRAMES} frames, and the clips have {frames}: "
                "make astrolabe.chunks larger"
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


def load_clip_digit(weights: str, *, device: str) -> ClipDigit:
    """From a folder of judges. Raises ValueError when it is none."""
    judge = load_judges(weights).frame
    return ClipDigit(judge.to(device), weights=weights)


def load_clip_motion(weights: str, question: Question, *, device: str) -> ClipMotion:
    """From a folder of judges. Raises ValueError when it is none."""
    judges = load_judges(weights)
    judges.clip.to(device)
    return ClipMotion(judges, question, weights=weights)
