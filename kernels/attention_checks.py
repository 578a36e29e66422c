"""What attention refuses, in words that say what to change. Legend as in `fewstep.kernels.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.kernels.mask import AttentionMask

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None) -> None:
    """Raise ValueError unless q, k, v and the mask fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; attention takes [batch, heads, tokens, width]. Split the heads "
                "and move them before the tokens: x.unflatten(-1, (heads, -1)).transpose(1, 2)."
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}; attention takes {', '.join(map(str, DTYPES))}. Cast it.")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q is {q.dtype} on {q.device} and {name} is {x.dtype} on {x.device}; cast or move them to one of each."
            )
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise ValueError(f"q, k and v have batches {q.shape[0]}, {k.shape[0]}, {v.shape[0]}; expand them to one.")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; they must agree in all but the last number."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"Heads of q are {q.shape[3]} wide and those of k {k.shape[3]}; they must be equal.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(
            f"q has {q.shape[1]} heads and k {k.shape[1]}; the heads of q must be a multiple of those of k."
        )
    if mask is not None:
        check_mask(mask, q, k)


def check_mask(mask: AttentionMask, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless the mask is one for these queries and keys."""
    if not isinstance(mask, AttentionMask):
        given = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"mask is {given}; attention takes ranges of keys (fewstep.kernels.mask: causal, lengths, ..., or "
            "from_predicate; with_key_bias for a number added to each key). Other numbers added to scores, and masks "
            "that differ between heads, it cannot take."
        )
    if (mask.queries, mask.keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"The mask is for {mask.queries} queries and {mask.keys} keys, but q has {q.shape[2]} and k {k.shape[2]} "
            "tokens. Build the mask for these lengths (fewstep.kernels.mask)."
        )
    if mask.key_bias is not None and mask.key_bias.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"The key bias is for a batch of {mask.key_bias.shape[0]} and q has {q.shape[0]}; give one row, which then "
            "holds for all, or one for each sample."
        )
    if mask.batch not in (1, q.shape[0]):
        raise ValueError(
            f"The mask is for a batch of {mask.batch} and q has {q.shape[0]}; build it for one sample, which then "
            "holds for all, or for each of them."
        )


def check_tangents(primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> None:
    """Raise ValueError unless each tangent is like its primal."""
    for name, primal, tangent in zip("qkv", primals, tangents, strict=True):
        if tangent is None:
            continue
        if tangent.shape != primal.shape:
            raise ValueError(
                f"The tangent of {name} has shape {tuple(tangent.shape)} and {name} has {tuple(primal.shape)}; a "
                "tangent has the shape of what it belongs to. Expand it, or pass None where it is zero."
            )
        if tangent.dtype != primal.dtype or tangent.device != primal.device:
            raise ValueError(
                f"The tangent of {name} is {tangent.dtype} on {tangent.device} and {name} is {primal.dtype} on "
                f"{primal.device}; torch makes such pairs without a word. Cast the tangent where it is made."
            )
