"""Latents as sequences of tokens, as the pipelines that patch outside of their networks hold them.

Legend: B batch, C channels; latents [B, C, h, w]; tokens [B, M, D], rows first.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2


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
