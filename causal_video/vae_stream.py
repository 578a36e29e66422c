"""Decoding and encoding a video piece by piece with AutoencoderKLWan, whose convolutions look back in time only.

Stock `decode` forgets its history at both ends. Here the history is a value that the caller holds: the VAE is not
changed, sessions share it, and a snapshot is the state itself.

Legend: B batch, C channels, F latent frames, T pixel frames; latents [B, C, F, h, w] at the scale of the network;
pixels [B, 3, T, H, W] in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor

from fewstep.causal_video.layout import TEMPORAL_STRIDE


@dataclass(frozen=True, eq=False)
class VaeState:
    """History of every causal convolution after `frames` frames of the stream (latent or pixel); empty at the start."""

    features: tuple[Any, ...] = ()
    frames: int = 0


START = VaeState()


def decode_stream(vae: AutoencoderKLWan, latents: Tensor, state: VaeState = START) -> tuple[Tensor, VaeState]:
    """Pixels of the next latent frames, and the history after them; the old state stays valid.

    The first latent frame of a stream gives one pixel frame, others `TEMPORAL_STRIDE`. Pieces of any lengths give what
    one call on all frames gives.

    Args:
        vae: without tiling.
        latents: [B, C, F, h, w].
        state: after the frames before.

    Raises:
        ValueError: the VAE tiles, which has no streams.
    """
    check_vae(vae)
    scale, shift = latent_statistics(vae, latents)
    raw = (latents * scale + shift).to(vae.dtype)
    x = vae.post_quant_conv(raw)
    features = list(state.features) or [None] * convolutions(vae, "decoder")
    pieces = []
    for frame in range(x.shape[2]):
        is_first = state.frames + frame == 0
        piece = vae.decoder(x[:, :, frame : frame + 1], feat_cache=features, feat_idx=[0], first_chunk=is_first)
        pieces.append(piece)
    pixels = torch.cat(pieces, dim=2)
    if vae.config["patch_size"] is not None:
        pixels = unpatchify(pixels, patch_size=vae.config["patch_size"])
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return (pixels.clamp(-1, 1) / 2 + 0.5), VaeState(tuple(features), state.frames + x.shape[2])


def encode_stream(vae: AutoencoderKLWan, pixels: Tensor, state: VaeState = START) -> tuple[Tensor, VaeState]:
    """Latents of the next pixel frames (the mode of the posterior), and the history after them.

    Args:
        vae: without tiling.
        pixels: [B, 3, T, H, W]; T is 1 + 4 k at the start of a stream, so one image is one latent frame, then 4 k.
        state: after the frames before.

    Raises:
        ValueError: the VAE tiles or has another temporal stride, or T is another number.
    """
    check_vae(vae)
    if 2 ** sum(vae.temperal_downsample) != TEMPORAL_STRIDE:
        raise ValueError(f"the VAE groups {2 ** sum(vae.temperal_downsample)} frames, not {TEMPORAL_STRIDE}")
    first = 1 if state.frames == 0 else 0
    count = pixels.shape[2]
    if count < 1 or (count - first) % TEMPORAL_STRIDE:
        raise ValueError(
            f"a piece has {'1 + ' if first else ''}{TEMPORAL_STRIDE} k pixel frames "
            f"{'at the start' if first else 'after the start'} of a stream, got {count}"
        )
    x = (pixels * 2 - 1).to(vae.dtype)
    if vae.config["patch_size"] is not None:
        x = patchify(x, patch_size=vae.config["patch_size"])
    features = list(state.features) or [None] * convolutions(vae, "encoder")
    groups = [1] * first + [TEMPORAL_STRIDE] * ((count - first) // TEMPORAL_STRIDE)
    pieces = [vae.encoder(group, feat_cache=features, feat_idx=[0]) for group in x.split(groups, dim=2)]
    mean = vae.quant_conv(torch.cat(pieces, dim=2)).chunk(2, dim=1)[0]
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    scale, shift = latent_statistics(vae, mean)
    return (mean - shift) / scale, VaeState(tuple(features), state.frames + count)


def latent_statistics(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, Tensor]:
    """(std, mean) [1, C, 1, 1, 1] with raw = std latents + mean."""
    view = (1, -1, 1, 1, 1)
    return (
        torch.as_tensor(vae.config["latents_std"]).to(latents).view(view),
        torch.as_tensor(vae.config["latents_mean"]).to(latents).view(view),
    )


def convolutions(vae: AutoencoderKLWan, part: str) -> int:
    """Causal convolutions of the "encoder" or "decoder", the length of its history."""
    return vae._cached_conv_counts[part]


def check_vae(vae: Any) -> None:
    """Raise ValueError unless this is an AutoencoderKLWan that does not tile."""
    if not isinstance(vae, AutoencoderKLWan):
        raise ValueError(f"streams are for AutoencoderKLWan, got {type(vae).__name__}")
    if vae.use_tiling:
        raise ValueError("a tiled VAE has no streams: call disable_tiling() on it")
