"""Latents of digits that follow actions, with the actions as controls: the data of steered students of digits.

Legend: N clips, T pixel frames, C channels, F latent frames, h x w latent pixels, A actions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fewstep.causal_video.model.controls import FrameControls
from fewstep.causal_video.stream.world import latent_actions
from fewstep.core.data import LatentDataset
from fewstep.core.teacher import Teacher
from fewstep.embedded.moving_digits.clips import ACTION_WORDS, CLIP_FRAMES, steered_digits

BATCH = 32


def action_channels(actions: Tensor) -> Tensor:
    """Controls [N, A, F] of actions [N, T], indices into `ACTION_WORDS`; "none" has no channel.

    Raises ValueError as `latent_actions`.
    """
    return latent_actions(functional.one_hot(actions, len(ACTION_WORDS))[..., 1:].float())


@torch.no_grad()
def encode_steered_digits(
    teacher: Teacher, *, count: int, seed: int, split: Literal["train", "test"] = "train", frames: int = CLIP_FRAMES
) -> tuple[LatentDataset, FrameControls]:
    """Latents [N, C, F, h, w] and controls [N, 4, F] of clips 0 to count - 1 of a seed.

    Args:
        teacher: whose autoencoder encodes.
        count: N.
        seed: of the clips.
        split: of the pictures of digits.
        frames: T, 4 k + 1.

    Raises:
        ValueError: fewer than one clip, or frames that do not fit.
    """
    if count < 1:
        raise ValueError(f"count is {count}; encode at least 1 clip")
    device = teacher.null_condition.device
    latents, controls, captions = [], [], []
    for start in tqdm(range(0, count, BATCH), desc="steered digits"):
        clips = steered_digits(split, seed=seed, indices=range(start, min(start + BATCH, count)), frames=frames)
        controls.append(action_channels(clips.actions))
        latents.append(teacher.encode_pixels(clips.pixels.to(device)).float().cpu())
        captions += clips.captions
    return LatentDataset(torch.cat(latents), tuple(captions)), FrameControls(torch.cat(controls), ACTION_WORDS[1:])
