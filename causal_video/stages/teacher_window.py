"""The piece of a long video that a bidirectional teacher of fixed length can judge.

Wan's first latent frame stands for one pixel frame, later ones for four. A piece from the middle of a video has a first
latent of the wrong kind, so it is decoded to its last pixel frame and encoded again as an image (Self-Forcing,
arXiv:2506.08009, released code for rollouts beyond 21 latents; LongLive, arXiv:2509.22622).

Legend: B batch, C channels, F latent frames, h x w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fewstep.causal_video.vae_stream import START, VaeState, decode_stream, encode_stream


@dataclass(frozen=True, eq=False)
class TeacherWindow:
    """Latents [B, C, length, h, w], and bool [length]: True where the loss counts."""

    latents: Tensor
    counts: Tensor


def teacher_window(video: Tensor, first: Tensor | None, *, length: int, new_frames: int) -> TeacherWindow:
    """The last `length` frames, the first of them replaced, with a mask of the new frames.

    Args:
        video: [B, C, F, h, w]; gradients flow to its new frames.
        first: [B, C, 1, h, w], the first latent of the window encoded as an image (`image_latent`); None where the
            window is the beginning of the video.
        length: latent frames of the teacher.
        new_frames: frames at the end that the loss is about. The frame that was replaced never counts.

    Raises:
        ValueError: there are fewer frames than the window has, more new ones than it has, or `first` is missing or
            given where it does not belong.
    """
    frames = video.shape[2]
    if not 1 <= new_frames <= length <= frames:
        raise ValueError(f"need 1 <= new_frames <= length <= frames, got {new_frames}, {length}, {frames}")
    if (first is None) != (frames == length):
        raise ValueError(
            f"a window of {length} in {frames} frames {'needs' if first is None else 'has no use for'} an image latent "
            "in its first place"
        )
    window = video[:, :, frames - length :]
    counts = torch.arange(length, device=video.device) >= length - new_frames
    if first is None:
        return TeacherWindow(window, counts)
    if first.shape != window[:, :, :1].shape:
        raise ValueError(f"an image latent must be {list(window[:, :, :1].shape)}, got {list(first.shape)}")
    counts[0] = False
    return TeacherWindow(torch.cat([first.detach().to(window), window[:, :, 1:]], dim=2), counts)


@torch.no_grad()
def image_latent(vae: AutoencoderKLWan, latents: Tensor, state: VaeState = START) -> Tensor:
    """The last pixel frame of decoded latents, encoded as an image: [B, C, 1, h, w].

    Args:
        vae: see `decode_stream`.
        latents: [B, C, F, h, w] up to the first frame of the window, it included.
        state: of the decoder before them.
    """
    pixels, _ = decode_stream(vae, latents, state)
    return encode_stream(vae, pixels[:, :, -1:])[0].to(latents.dtype)
