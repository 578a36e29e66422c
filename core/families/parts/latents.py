"""Latents and what they stand for: pixels of diffusers' autoencoders at the scale of the networks, and their tokens.

Legend: B batch, C channels, F latent frames, T frames; latents [B, C, h, w] or [B, C, F, h, w]; pixels [B, 3, H, W] or
[B, 3, T, H, W] in [0, 1]; tokens [B, M, D], rows first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

PATCH = 2


def scale_and_shift(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(a, b) with raw = a latents + b: per channel where the autoencoder has statistics, in its config or (LTX) as
    buffers, else its scaling and shift factors."""
    config, buffers = vae.config, dict(vae.named_buffers(recurse=False))
    mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
    factor = config.get("scaling_factor") or 1.0
    if mean is None or std is None:
        return 1 / factor, config.get("shift_factor") or 0.0
    view = (1, -1, *([1] * (latents.ndim - 2)))
    std, mean = (torch.as_tensor(values).to(latents).view(view) for values in (std, mean))
    return std / factor, mean


def vae_decode(vae: Any, latents: Tensor, **arguments: Any) -> Tensor:
    """Pixels in [0, 1], fp32 at least, from latents at the scale of the network; `arguments` go to the decoder."""
    scale, shift = scale_and_shift(vae, latents)
    raw = (latents * scale + shift).to(vae.dtype)
    pixels = vae.decode(raw, return_dict=False, **arguments)[0]
    return (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def vae_encode(vae: Any, pixels: Tensor, generator: torch.Generator | None, *, videos: bool = False) -> Tensor:
    """Latents at the scale of the network, fp32 at least: a draw with `generator`, the mode of the posterior without.

    Raises:
        ValueError: the pixels are no batch of pictures (or videos) of three channels.
    """
    if pixels.ndim != 4 + videos or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be [B, 3, {'F, ' * videos}H, W], got shape {tuple(pixels.shape)}")
    posterior = vae.encode((pixels * 2 - 1).to(vae.dtype), return_dict=False)[0]
    raw = posterior.mode() if generator is None else posterior.sample(generator)
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    scale, shift = scale_and_shift(vae, raw)
    return (raw - shift) / scale


def latent_frames(pixel_frames: int, *, factor: int = 4) -> int:
    """Latent frames of a video: the first stands for one pixel frame, each other one for `factor`.

    Raises:
        ValueError: the number of pixel frames is not factor k + 1.
    """
    if pixel_frames < 1 or (pixel_frames - 1) % factor:
        raise ValueError(f"frames must be {factor} k + 1 (1, {factor + 1}, {2 * factor + 1}, ...), got {pixel_frames}")
    return (pixel_frames - 1) // factor + 1


def require_scaling(vae: Mapping[str, Any]) -> None:
    """Raises ValueError for the config of an autoencoder whose latents have no scale."""
    if "scaling_factor" in vae and not vae["scaling_factor"]:
        raise ValueError(
            f"the autoencoder's scaling_factor is {vae['scaling_factor']}, which leaves nothing of its latents: "
            "correct vae/config.json, as the original model has it"
        )


def pack_patches(latents: Tensor) -> Tensor:
    """Patches of 2 x 2 as tokens [B, h w / 4, 4 C], of a patch channels first, then rows (FLUX.1, Qwen-Image)."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack_patches(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Inverse of `pack_patches` for latents of `size` (h, w)."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=size[0] // PATCH, p=PATCH, q=PATCH)


def flatten_positions(latents: Tensor) -> Tensor:
    """Every position of latents [B, C, ...] as a token [B, M, C]."""
    return rearrange(latents, "b c ... -> b (...) c")


def unflatten_positions(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """Inverse of `flatten_positions` for latents whose positions are `size`."""
    return tokens.transpose(1, 2).unflatten(2, size)


def positions(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Numbers [M, len(sizes)] of all places of a grid, the last axis first to move."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in sizes]
    return torch.cartesian_prod(*axes) if len(axes) > 1 else axes[0][:, None]


def require_even(name: str, size: tuple[int, ...]) -> None:
    """Raises ValueError for latents that no patches of 2 x 2 cover."""
    if any(side % PATCH for side in size[-2:]):
        raise ValueError(f"{name} takes latents of even height and width, got {tuple(size[-2:])}")


def picture_images(pixels: Tensor) -> list[Image.Image]:
    """Pictures [B, 3, H, W] in [0, 1] as images of 8 bits, as a user gives them to a stock call."""
    eight_bits = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in eight_bits]
