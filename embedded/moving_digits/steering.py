"""Measures of clips whose digit is to follow actions: does it move as it was told, and is it still the digit?

Shapes: N clips, T pixel frames, P pieces of four frames; pixels [N, 3, T, 32, 32] in [0, 1], actions [N, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.moving_digits.clips import (
    ACTION_FRAMES,
    ACTION_SPEED,
    ACTION_WORDS,
    CANVAS,
    DIGIT,
    DIRECTION_STEPS,
)
from fewstep.embedded.moving_digits.judges import VideoJudges
from fewstep.embedded.moving_digits.measures import frame_features, light_centres, segments

# A digit that was told to stay may move by this many pixels in a piece; one that was told to move goes four.
STILL = 2.0
# The centre of light lies within this many pixels of the middle of a digit's box.
OFF_CENTRE = 1.0


@dataclass(frozen=True)
class SteeringResult:
    """How N clips follow their actions, in pieces of one latent frame.

    Attributes:
        samples: N.
        frames: T.
        counted: fraction of pieces that count: there is light at both ends, and no wall in the way.
        obeyed: fraction of these in which the digit moves as told, of five possibilities.
        stayed: the same of the pieces without an action.
        speed: mean displacement along the action, in pixels per frame; `ACTION_SPEED` where it is obeyed exactly.
        digit_accuracy: fraction of clips whose mean frame logits name the digit of the prompt.
        segment_obeyed: `obeyed` of equal consecutive parts of the clips.
        segment_accuracy: fraction of frames whose digit is the prompt's, of the same parts.
    """

    samples: int
    frames: int
    counted: float
    obeyed: float
    stayed: float
    speed: float
    digit_accuracy: float
    segment_obeyed: tuple[float, ...]
    segment_accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Pieces:
    """Pieces of four frames [N, P]: what was told, displacement [N, P, 2] (down, right) in pixels, and which count."""

    actions: Tensor
    moved: Tensor
    counts: Tensor

    @property
    def seen(self) -> Tensor:
        """[N, P] the action that the displacement looks like."""
        directions = torch.tensor(DIRECTION_STEPS, dtype=self.moved.dtype)
        seen = (self.moved @ directions.T).argmax(dim=-1) + 1
        return seen.where(self.moved.norm(dim=-1) >= STILL, 0)


def action_pieces(pixels: Tensor, actions: Tensor) -> Pieces:
    """Cut clips into the latent frames after the first.

    Raises:
        ValueError: T is not 1 + 4 k with k >= 1, actions are [N, T] no indices of `ACTION_WORDS`, or an action changes
            within a piece.
    """
    count, frames = len(pixels), pixels.shape[2]
    if frames < 1 + ACTION_FRAMES or (frames - 1) % ACTION_FRAMES:
        raise ValueError(f"clips have {frames} frames; steering is judged in 1 + {ACTION_FRAMES} k of them, k >= 1")
    if actions.shape != (count, frames) or actions.min() < 0 or actions.max() >= len(ACTION_WORDS):
        raise ValueError(f"actions must be {[count, frames]} numbers from 0 to {len(ACTION_WORDS) - 1}")
    told = actions[:, 1:].unflatten(1, (-1, ACTION_FRAMES))
    if (told != told[..., :1]).any():
        raise ValueError(f"an action must hold for the {ACTION_FRAMES} frames of a latent frame")
    told = told[..., 0]
    centres, lit = (part[:, ::ACTION_FRAMES] for part in light_centres(pixels))
    steps = torch.tensor(((0.0, 0.0), *DIRECTION_STEPS), dtype=centres.dtype)[told]
    ends = centres[:, :-1] + steps * ACTION_SPEED * ACTION_FRAMES
    margin = DIGIT / 2 + OFF_CENTRE
    free = ((ends >= margin) & (ends <= CANVAS - margin)) | (steps == 0)
    return Pieces(told, centres.diff(dim=1), lit[:, 1:] & lit[:, :-1] & free.all(dim=-1))


def measure_steering(
    judges: VideoJudges, pixels: Tensor, actions: Tensor, *, prompts: Sequence[str], parts: int = 3
) -> SteeringResult:
    """All measures of clips told `actions`, whose prompts name their digit.

    Raises:
        ValueError: as `action_pieces`; prompts that are another number or name no digit; fewer pieces than parts; no
            piece of a part counts.
    """
    if len(prompts) != len(pixels):
        raise ValueError(f"{len(prompts)} prompts for {len(pixels)} clips; use one prompt per clip")
    digits = torch.tensor([label_of_prompt(text) for text in prompts])
    pieces = action_pieces(pixels, actions)
    right = (pieces.seen == pieces.actions).double()
    cuts = segments(pieces.actions.shape[1], parts)
    directions = torch.tensor(((0.0, 0.0), *DIRECTION_STEPS), dtype=pieces.moved.dtype)[pieces.actions]
    along = (pieces.moved * directions).sum(dim=-1) / ACTION_FRAMES
    logits = judges.frame.head(frame_features(judges.frame, pixels).float()).unflatten(0, (len(pixels), -1))
    named = (logits.argmax(dim=-1) == digits[:, None]).double()

    def mean(values: Tensor, chosen: Tensor) -> float:
        if not chosen.any():
            raise ValueError("no piece counts: the clips are black, or every action leads into a wall")
        return values[chosen].mean().item()

    return SteeringResult(
        samples=len(pixels),
        frames=pixels.shape[2],
        counted=pieces.counts.double().mean().item(),
        obeyed=mean(right, pieces.counts),
        stayed=mean(right, pieces.counts & (pieces.actions == 0)),
        speed=mean(along, pieces.counts & (pieces.actions > 0)),
        digit_accuracy=(logits.mean(dim=1).argmax(dim=-1) == digits).double().mean().item(),
        segment_obeyed=tuple(mean(right[:, cut], pieces.counts[:, cut]) for cut in cuts),
        segment_accuracy=tuple(
            named[:, 1 + cut.start * ACTION_FRAMES : 1 + cut.stop * ACTION_FRAMES].mean().item() for cut in cuts
        ),
    )
