"""One Wan transformer block with a time per frame, keys of earlier frames, and masks; the weights are diffusers' own.

Stock blocks modulate per token, which takes B * tokens * 6 D numbers where B * F * 6 D say the same, and their
self-attention takes neither masks in O(N) memory nor keys from a cache.

Legend: B batch, F frames, P tokens per frame, M = F P tokens of the call, N text tokens, D width, H heads, d width of a
head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

from fewstep.causal_video.model.prefix import Prefix
from fewstep.core.paths import at_least_fp32
from fewstep.core.tangents.processors import merge_heads, project_out, rotate_pairs
from fewstep.kernels.attention import attention
from fewstep.kernels.mask import AttentionMask


@dataclass(frozen=True, eq=False)
class Sight:
    """What self-attention sees beside the call's own tokens, shared by all layers.

    Attributes:
        cosines: [1, 1, keys, d] RoPE of all keys, those of the prefix first; the queries are the last M.
        sines: the same.
        mask: among own tokens; None sees all.
        prefix: keys and values before RoPE, or None.
    """

    cosines: Tensor
    sines: Tensor
    mask: AttentionMask | None
    prefix: Prefix | None


@dataclass(frozen=True, eq=False)
class Prompt:
    """Text, and its keys and values per layer [B, H, N, d] for calls without gradients.

    They hold for the weights they were made with. Calls that build a graph start from `tokens` [B, N, width], so that
    gradients reach the projections of the text too.
    """

    tokens: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """Tokens [B, M, D] after a block; keys before RoPE, and values, [B, H, M, d]."""

    hidden: Tensor
    keys: Tensor
    values: Tensor


def block_forward(
    block: WanTransformerBlock,
    layer: int,
    hidden: Tensor,
    text: Tensor | tuple[Tensor, Tensor],
    modulation: Tensor,
    sight: Sight,
) -> BlockOutput:
    """`WanTransformerBlock.forward` with modulation per frame.

    Args:
        block: a stock block, with or without adapters.
        layer: its number, which finds its part of the prefix.
        hidden: [B, M, D], frame after frame.
        text: embedded tokens [B, N, D], or their keys and values [B, H, N, d].
        modulation: [B, F, 6, D].
        sight: what self-attention sees.
    """
    table = at_least_fp32(block.scale_shift_table)[None] + at_least_fp32(modulation)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=2)
    frames = modulation.shape[1]
    dtype = hidden.dtype

    normed = modulate(layer_norm(block.norm1, hidden), scale, shift).to(dtype)
    mixed, keys, values = self_attention(block.attn1, normed, layer, sight)
    hidden = gated_sum(hidden, mixed, gate, frames)

    normed = layer_norm(block.norm2, hidden).to(dtype)
    hidden = hidden + cross_attention(block.attn2, normed, text)

    normed = modulate(layer_norm(block.norm3, hidden), ff_scale, ff_shift).to(dtype)
    return BlockOutput(gated_sum(hidden, block.ffn(normed), ff_gate, frames), keys, values)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm in fp32 at least. diffusers' own layer narrows fp64 to fp32; an identity stays one."""
    if not isinstance(norm, nn.LayerNorm):
        return norm(at_least_fp32(x))
    weight, bias = (None if p is None else at_least_fp32(p) for p in (norm.weight, norm.bias))
    return functional.layer_norm(at_least_fp32(x), norm.normalized_shape, weight, bias, norm.eps)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (1 + scale) + shift on tokens [B, M, D], with scale and shift [B, F, 1, D]."""
    frames = scale.shape[1]
    return (x.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor, frames: int) -> Tensor:
    """x + gate y on tokens [B, M, D] with gate [B, F, 1, D], summed in fp32 at least, in the dtype of x."""
    gated = (at_least_fp32(y).unflatten(1, (frames, -1)) * gate).flatten(1, 2)
    return (at_least_fp32(x) + gated).to(x.dtype)


def self_attention(attn: WanAttention, x: Tensor, layer: int, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
    """Mixed tokens [B, M, D], own keys before RoPE and own values [B, H, M, d]."""
    refuse_fused(attn)
    query, key, value = (heads(attn, y) for y in (attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)))
    keys, values = (key, value) if sight.prefix is None else sight.prefix.with_own(layer, key, value)
    own = x.shape[1]
    query = rotate_pairs(query, sight.cosines[:, :, -own:], sight.sines[:, :, -own:])
    keys = rotate_pairs(keys, sight.cosines, sight.sines)
    return project_out(attn, merge_heads(attention(query, keys, values, mask=sight.mask))), key, value


def cross_attention(attn: WanAttention, x: Tensor, text: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Tokens [B, M, D] mixed with text: embedded tokens [B, N, D], or their keys and values."""
    keys, values = text_keys_values(attn, text) if isinstance(text, Tensor) else text
    return project_out(attn, merge_heads(attention(heads(attn, attn.norm_q(attn.to_q(x))), keys, values)))


def text_keys_values(attn: WanAttention, text: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, N, d] of embedded text [B, N, D]."""
    refuse_fused(attn)
    return heads(attn, attn.norm_k(attn.to_k(text))), heads(attn, attn.to_v(text))


def heads(attn: WanAttention, x: Tensor) -> Tensor:
    """[B, M, H d] as [B, H, M, d]."""
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def refuse_fused(attn: Any) -> None:
    """Raise ValueError if the projections are fused: the separate ones would be stale."""
    if attn.fused_projections:
        raise ValueError("Wan's projections are fused: call the network's unfuse_qkv_projections() first")
