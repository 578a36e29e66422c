"""Clips of handwritten digits that move on a small canvas and bounce at its walls, with their captions.

A digit fills a square of 16 pixels on a canvas of 32, so its position (top, left) moves in [0, 16] along each axis. It
starts at a multiple of 4 pixels, which is one latent of the embedded autoencoder; positions between pixels are rendered
bilinearly.

Shapes: N clips, F pixel frames, pixels [N, 3, F, 32, 32] in [0, 1], positions [N, F, 2] (top, left) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.randomness import sample_uniform
from fewstep.embedded.digits.images import DIGIT_WORDS, load_digits_split

CANVAS = 32
DIGIT = 16
# The largest top and left of a digit that is whole on the canvas.
REACH = CANVAS - DIGIT
CLIP_FRAMES = 25

DIRECTION_WORDS = ("left", "right", "up", "down")
# (top, left) of a unit step in each direction.
DIRECTION_STEPS = ((0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0))
SPEED_WORDS = ("slowly", "quickly")
# Pixels per frame: a slow digit crosses 12 pixels in a clip of 25 frames, a quick one would cross 24. In a latent
# frame, which is four frames, they move by half a latent and by a whole one.
SPEEDS = (0.5, 1.0)
# Digits start on a grid of this many pixels, and at most one of it away from the wall behind them: a slow one does not
# turn within a clip, a quick one turns after 12 frames at the earliest.
START_SPACING = 4.0
START_MARGINS = 2
START_LINES = int(REACH / START_SPACING) + 1

ACTION_WORDS = ("none", *DIRECTION_WORDS)
ACTION_SPEED = 1.0
# An action is held for this many times ACTION_FRAMES frames, at least and at most, both included. Four frames after the
# first are one latent frame, so a latent frame has one action.
ACTION_FRAMES = 4
ACTION_HOLD = (1, 3)

# {d} is a digit, {w} a direction, {s} a speed.
PHRASINGS = (
    "a {d} moving {w} {s}",
    "the digit {d} moves {s} {w}",
    "a handwritten {d} drifts {w} {s}",
    "the number {d} {s} moving {w}",
)


@dataclass(frozen=True)
class MovingDigits:
    """Clips and what they show.

    Attributes:
        pixels: [N, 3, F, 32, 32] in [0, 1], the three channels equal (and the same memory).
        labels: [N] digits 0..9.
        directions: [N] index into `DIRECTION_WORDS`, the direction of the first step.
        speeds: [N] index into `SPEED_WORDS`.
        positions: [N, F, 2] (top, left) in pixels, float64.
        captions: N sentences that name digit, direction and speed.
    """

    pixels: Tensor
    labels: Tensor
    directions: Tensor
    speeds: Tensor
    positions: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class SteeredDigits:
    """Clips of digits that follow actions.

    Attributes:
        pixels: [N, 3, F, 32, 32] in [0, 1].
        labels: [N] digits 0..9.
        actions: [N, F] index into `ACTION_WORDS`; action f leads from frame f - 1 to frame f, and action 0 is none.
        positions: [N, F, 2] (top, left) in pixels, float64.
        captions: N sentences that name the digit.
    """

    pixels: Tensor
    labels: Tensor
    actions: Tensor
    positions: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return self.labels.shape[0]


def bounce(position: Tensor, reach: float) -> Tensor:
    """Where a point is that walked to `position` on a line between walls at 0 and `reach`: the triangle wave."""
    folded = position.remainder(2.0 * reach)
    return torch.minimum(folded, 2.0 * reach - folded)


def straight_positions(start: Tensor, velocity: Tensor, frames: int) -> Tensor:
    """Positions [N, F, 2] from starts [N, 2] and velocities [N, 2] (pixels per frame), bouncing at the walls."""
    steps = torch.arange(frames, dtype=start.dtype, device=start.device)
    return bounce(start[:, None] + steps[None, :, None] * velocity[:, None], REACH)


def steered_positions(start: Tensor, actions: Tensor) -> Tensor:
    """Positions [N, F, 2] from starts [N, 2] and actions [N, F]; a wall stops the digit.

    Raises ValueError for actions out of range or a first action that is not none.
    """
    if actions.min() < 0 or actions.max() >= len(ACTION_WORDS) or actions[:, 0].any():
        raise ValueError(
            f"actions must be 0 to {len(ACTION_WORDS) - 1} and start with 0 (none), got {actions.tolist()}"
        )
    steps = torch.tensor(((0.0, 0.0), *DIRECTION_STEPS), dtype=start.dtype)[actions] * ACTION_SPEED
    places = [start]
    for frame in range(1, actions.shape[1]):
        places.append((places[-1] + steps[:, frame]).clamp(0.0, REACH))
    return torch.stack(places, dim=1)


def render(digits: Tensor, positions: Tensor) -> Tensor:
    """Clips [N, 3, F, 32, 32] of digits [N, 16, 16] at positions [N, F, 2], bilinear between pixels, black around."""
    count, frames = positions.shape[:2]
    centres = torch.arange(CANVAS, dtype=torch.float32) + 0.5
    # In the coordinates of grid_sample a digit spans -1 to 1.
    inside = 2.0 * (centres - positions.reshape(-1, 2, 1).float()) / DIGIT - 1.0
    rows = inside[:, 0, :, None].expand(-1, -1, CANVAS)
    columns = inside[:, 1, None, :].expand(-1, CANVAS, -1)
    grid = torch.stack([columns, rows], dim=-1)
    source = digits[:, None].repeat_interleave(frames, dim=0)
    drawn = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return drawn.clamp(0.0, 1.0).view(count, 1, frames, CANVAS, CANVAS).expand(-1, 3, -1, -1, -1)


@lru_cache(maxsize=2)
def small_digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Digits [M, 16, 16] in [0, 1] and labels [M] of a split of `load_digits_split`."""
    images = load_digits_split(split)
    return F.avg_pool2d(images.pixels[:, :1], 2)[:, 0], images.labels


def clip_caption(digit: int, direction: int, speed: int, phrasing: int) -> str:
    """The caption of a moving digit."""
    return PHRASINGS[phrasing].format(d=DIGIT_WORDS[digit], w=DIRECTION_WORDS[direction], s=SPEED_WORDS[speed])


def all_clip_captions() -> list[str]:
    """Every caption, 10 digits x 4 directions x 2 speeds x 4 phrasings, digit fastest."""
    return [
        clip_caption(digit, direction, speed, phrasing)
        for phrasing in range(len(PHRASINGS))
        for speed in range(len(SPEED_WORDS))
        for direction in range(len(DIRECTION_WORDS))
        for digit in range(10)
    ]


def balanced_clip_prompt(index: int) -> str:
    """The prompt of sample `index` in an evaluation: digits cycle fastest, then directions, speeds and phrasings."""
    captions = all_clip_captions()
    return captions[index % len(captions)]


def direction_of_prompt(prompt: str) -> int:
    """The direction that a caption names. Raises ValueError when it names none or several."""
    return _named(prompt, DIRECTION_WORDS)


def speed_of_prompt(prompt: str) -> int:
    """The speed that a caption names. Raises ValueError when it names none or several."""
    return _named(prompt, SPEED_WORDS)


def _named(prompt: str, words: Sequence[str]) -> int:
    found = [place for place, word in enumerate(words) if word in prompt.lower().split()]
    if len(found) != 1:
        raise ValueError(f"prompt {prompt!r} must name exactly one of {', '.join(words)}")
    return found[0]


def _pick(uniform: Tensor, count: int) -> Tensor:
    """Integers in [0, count) from numbers in [0, 1)."""
    return (uniform * count).long().clamp(max=count - 1)


def moving_digits(
    split: Literal["train", "test"],
    *,
    seed: int,
    indices: Sequence[int],
    frames: int = CLIP_FRAMES,
) -> MovingDigits:
    """Clips number `indices` of a seed; each depends on (split, seed, its index, frames) alone.

    Digit classes, directions, speeds, phrasings and pictures are uniform. Raises ValueError for fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; a clip has at least 1")
    digits, labels = small_digits(split)
    draw = sample_uniform(seed, indices, (7,), stream="moving_digits", dtype=torch.float64)
    rows = _rows_of_classes(labels, wanted=_pick(draw[:, 0], 10), uniform=draw[:, 1])
    directions, speeds = _pick(draw[:, 2], 4), _pick(draw[:, 3], 2)
    phrasings = _pick(draw[:, 4], len(PHRASINGS))

    unit = torch.tensor(DIRECTION_STEPS, dtype=torch.float64)[directions]
    margin = _pick(draw[:, 5], START_MARGINS) * START_SPACING
    # Along the motion: `margin` from the wall behind. Across it: any line of the grid.
    behind = torch.where(unit > 0, margin[:, None], REACH - margin[:, None])
    start = torch.where(unit == 0, (_pick(draw[:, 6], START_LINES) * START_SPACING)[:, None], behind)
    velocity = unit * torch.tensor(SPEEDS, dtype=torch.float64)[speeds][:, None]
    positions = straight_positions(start, velocity, frames)
    named = zip(labels[rows].tolist(), directions.tolist(), speeds.tolist(), phrasings.tolist(), strict=True)
    captions = tuple(clip_caption(*one) for one in named)
    return MovingDigits(render(digits[rows], positions), labels[rows], directions, speeds, positions, captions)


def steered_digits(
    split: Literal["train", "test"], *, seed: int, indices: Sequence[int], frames: int = CLIP_FRAMES
) -> SteeredDigits:
    """Clips whose digit follows a random action, held for 1 to 3 latent frames; otherwise as `moving_digits`.

    Captions are "a seven". Raises ValueError for fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; a clip has at least 1")
    digits, labels = small_digits(split)
    draw = sample_uniform(seed, indices, (4,), stream="steered_digits", dtype=torch.float64)
    rows = _rows_of_classes(labels, wanted=_pick(draw[:, 0], 10), uniform=draw[:, 1])
    holds = sample_uniform(seed, indices, (frames, 2), stream="steered_actions", dtype=torch.float64)
    actions = torch.zeros(len(rows), frames, dtype=torch.int64)
    shortest, longest = ACTION_HOLD
    for clip in range(len(rows)):
        frame, piece = 1, 0
        while frame < frames:
            hold = ACTION_FRAMES * (shortest + int(_pick(holds[clip, piece, 0], longest - shortest + 1)))
            actions[clip, frame : frame + hold] = _pick(holds[clip, piece, 1], len(ACTION_WORDS))
            frame, piece = frame + hold, piece + 1
    positions = steered_positions(_pick(draw[:, 2:], START_LINES) * START_SPACING, actions)
    captions = tuple(f"a {DIGIT_WORDS[digit]}" for digit in labels[rows].tolist())
    return SteeredDigits(render(digits[rows], positions), labels[rows], actions, positions, captions)


def _rows_of_classes(labels: Tensor, *, wanted: Tensor, uniform: Tensor) -> Tensor:
    """For each wanted digit a picture of it: the row chosen by a number in [0, 1)."""
    by_class = [torch.nonzero(labels == digit)[:, 0] for digit in range(10)]
    return torch.stack(
        [by_class[digit][_pick(u, len(by_class[digit]))] for digit, u in zip(wanted.tolist(), uniform, strict=True)]
    )
