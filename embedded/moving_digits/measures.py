"""Measures of generated clips of moving digits: is it what was asked for, does it look real, does it stay so?

Shapes: N clips, F pixel frames, pixels [N, 3, F, 32, 32] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.moving_digits.clips import CLIP_FRAMES, direction_of_prompt, speed_of_prompt
from fewstep.embedded.moving_digits.judges import ClipJudge, FrameJudge, VideoJudges, clip_logits, frames_of
from fewstep.evaluation.measures.statistics import feature_distance

FEATURE_BATCH = 512
# Sum over a frame; a digit has about forty.
LEAST_LIGHT = 2.0


@dataclass(frozen=True)
class VideoReference:
    """Features of real clips: frames [M, 64] and clips [K, 64], float64, and the motion of those clips."""

    frame_features: Tensor
    clip_features: Tensor
    motion: float


@dataclass(frozen=True)
class VideoResult:
    """Measures of N clips.

    Attributes:
        samples: N.
        frames: pixel frames of each clip.
        digit_accuracy: fraction of clips whose mean frame logits name the digit of the prompt.
        direction_accuracy: fraction whose first 25 frames move in the direction of the prompt.
        speed_accuracy: fraction whose first 25 frames have the speed of the prompt.
        black_frames: fraction of frames without light, which have no part in `motion`.
        motion: mean displacement of the centre of light per frame, in pixels.
        reference_motion: the same of the real clips.
        frame_distance: Frechet distance of frame features to real frames (FID with the frame judge's features).
        clip_distance: Frechet distance of clip features to real clips, in the manner of FVD (arXiv:1812.01717), of the
            first 25 frames.
        segment_accuracy: fraction of frames whose digit is the prompt's, for equal consecutive parts of the clips.
        segment_distance: frame distance of each such part.
    """

    samples: int
    frames: int
    digit_accuracy: float
    direction_accuracy: float
    speed_accuracy: float
    black_frames: float
    motion: float
    reference_motion: float
    frame_distance: float
    clip_distance: float
    segment_accuracy: tuple[float, ...]
    segment_distance: tuple[float, ...]

    @property
    def drift(self) -> float:
        """Frame accuracy lost from the first part to the last; 0 for a clip that stays what it was."""
        return self.segment_accuracy[0] - self.segment_accuracy[-1]


def light_centres(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of light [N, F, 2] (row, column) in pixels, and whether each frame [N, F] has enough light to have one.

    The centre of the first pixel is at 0.5. A frame without light gets (0, 0).
    """
    light = pixels.mean(dim=1).double()
    total = light.sum(dim=(-1, -2))
    rows, columns = (torch.arange(size, dtype=torch.float64, device=light.device) + 0.5 for size in light.shape[-2:])
    down, along = (light.sum(dim=-1) * rows).sum(dim=-1), (light.sum(dim=-2) * columns).sum(dim=-1)
    lit = total >= LEAST_LIGHT
    return torch.stack([down, along], dim=-1) / total.where(lit, torch.inf)[..., None], lit


def motion_amount(pixels: Tensor) -> float:
    """Mean distance in pixels that the centre of light moves from frame to frame, where both frames have light.

    Raises ValueError when no two consecutive frames have light.
    """
    centres, lit = light_centres(pixels)
    pairs = lit[:, 1:] & lit[:, :-1]
    if not pairs.any():
        raise ValueError(
            f"no two consecutive frames of {tuple(pixels.shape)} have light: there is no motion to measure"
        )
    return centres.diff(dim=1).norm(dim=-1)[pairs].mean().item()


@torch.no_grad()
def frame_features(judge: FrameJudge, pixels: Tensor) -> Tensor:
    """Features [N F, 64] float64 of every frame, clip after clip."""
    return torch.cat([judge.features(part).double() for part in frames_of(pixels).split(FEATURE_BATCH)])


@torch.no_grad()
def clip_features(judge: ClipJudge, pixels: Tensor) -> Tensor:
    """Features [N, 64] float64 of the first 25 frames of clips."""
    return torch.cat([judge.features(part).double() for part in pixels[:, :, :CLIP_FRAMES].split(FEATURE_BATCH // 4)])


def video_reference(judges: VideoJudges, pixels: Tensor) -> VideoReference:
    """What clips are compared with, from real clips [K, 3, F, 32, 32] of at least 25 frames."""
    return VideoReference(
        frame_features(judges.frame, pixels), clip_features(judges.clip, pixels), motion_amount(pixels)
    )


def segments(frames: int, count: int) -> list[slice]:
    """`count` consecutive parts of equal length, the last with the remainder. Raises ValueError for too few."""
    if not 1 <= count <= frames:
        raise ValueError(f"{frames} frames cannot be cut into {count} parts; use 1 to {frames}")
    length = frames // count
    return [slice(i * length, frames if i == count - 1 else (i + 1) * length) for i in range(count)]


def measure_clips(
    judges: VideoJudges, pixels: Tensor, *, prompts: Sequence[str], reference: VideoReference, parts: int = 5
) -> VideoResult:
    """All measures of clips [N, 3, F, 32, 32], F >= 25, that were asked for by `prompts` (captions of moving digits).

    Raises ValueError when counts differ, there are fewer than two clips, all frames are black, or a prompt does not
    name what is judged.
    """
    if len(prompts) != len(pixels) or len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts for {len(pixels)} clips; use one prompt per clip, at least two")
    digits, directions, speeds = (
        torch.tensor([read(text) for text in prompts])
        for read in (label_of_prompt, direction_of_prompt, speed_of_prompt)
    )
    with torch.no_grad():
        said = clip_logits(judges.clip, pixels)
    features = frame_features(judges.frame, pixels).unflatten(0, (len(pixels), -1))
    by_frame = judges.frame.head(features.float())
    right = (by_frame.argmax(dim=-1) == digits[:, None]).double()
    cuts = segments(pixels.shape[2], parts)
    distances = [feature_distance(features[:, cut].flatten(0, 1), reference.frame_features) for cut in cuts]

    def fraction(hits: Tensor) -> float:
        return hits.double().mean().item()

    return VideoResult(
        samples=len(pixels),
        frames=pixels.shape[2],
        digit_accuracy=fraction(by_frame.mean(dim=1).argmax(dim=-1) == digits),
        direction_accuracy=fraction(said.directions.argmax(dim=1) == directions),
        speed_accuracy=fraction(said.speeds.argmax(dim=1) == speeds),
        black_frames=fraction(~light_centres(pixels)[1]),
        motion=motion_amount(pixels),
        reference_motion=reference.motion,
        frame_distance=feature_distance(features.flatten(0, 1), reference.frame_features),
        clip_distance=feature_distance(clip_features(judges.clip, pixels), reference.clip_features),
        segment_accuracy=tuple(fraction(right[:, cut]) for cut in cuts),
        segment_distance=tuple(distances),
    )
