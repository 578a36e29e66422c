"""Attention processors of diffusers networks whose softmax attention has a tangent.

Each takes the place of the stock processor named as its base and computes the same numbers, through
`fewstep.kernels.attention.attention`. They hold no weights.

Legend: B batch, H heads, M image tokens, N text tokens or keys, D width of a token, d width of a head.
"""

# diffusers says FloatTensor where it takes any tensor.
# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from fewstep.core.families.sd3 import KeyBiasJointAttention, joint_projections, split_heads
from fewstep.kernels.attention import attention
from fewstep.kernels.attention_dispatch import with_bias_columns
from fewstep.kernels.mask import AttentionMask, unmasked
from fewstep.kernels.mask_intervals import is_batched

# Wan image-to-video puts the image tokens before this many text tokens, and its network knows them by the number alone.
WAN_TEXT_TOKENS = 512


class JvpJointAttention(KeyBiasJointAttention):
    """SD3's joint attention of image and text, SD3.5's attention of the image alone, and `key_bias` [N]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Image tokens [B, M, D], with text tokens [B, N, D] after a joint attention. Raises ValueError for a mask."""
        if attention_mask is not None:
            raise ValueError("SD3's attention takes no attention_mask; a text of identical tokens has a key_bias")
        if encoder_hidden_states is None:
            query, key, value = (
                split_heads(attn, hidden_states, projection, norm)
                for projection, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None))
            )
            return project_out(attn, merge_heads(attention(query, key, value)))
        query, key, value = joint_projections(attn, hidden_states, encoder_hidden_states)
        if key_bias is None:
            mixed = attention(query, key, value)
        else:
            # The image keys come first and stand for one token each.
            mixed = key_biased_attention(query, key, value, functional.pad(key_bias, (hidden_states.shape[1], 0))[None])
        image, text = merge_heads(mixed).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        # The last block has no use for text, hence no projection of it.
        return project_out(attn, image), text if attn.context_pre_only else attn.to_add_out(text)


class JvpSanaAttention(SanaAttnProcessor2_0):
    """SANA's attention of the image to the text (its self-attention is linear and plain torch)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Image tokens [B, M, D]; the mask is what SANA makes of its text mask, a bias [B, 1, N] of 0 and -10000."""
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.to_q(hidden_states), attn.to_k(tokens)
        # SANA's norms run over the width of all heads together.
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, attn.to_v(tokens)))
        mixed = key_biased_attention(query, key, value, key_bias_of(attention_mask, tokens))
        return project_out(attn, merge_heads(mixed)) / attn.rescale_output_factor


class JvpUnetAttention(AttnProcessor2_0):
    """Self-attention and cross-attention of the U-Nets of SD1.5 and SDXL."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, M, D], or a feature map [B, D, h, w]; the mask is a bias [B, 1, N] as the U-Net makes it."""
        shape = hidden_states.shape
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            tokens = attn.norm_encoder_hidden_states(tokens)
        mixed = key_biased_attention(
            split_heads(attn, hidden_states, attn.to_q, attn.norm_q),
            split_heads(attn, tokens, attn.to_k, attn.norm_k),
            split_heads(attn, tokens, attn.to_v, None),
            key_bias_of(attention_mask, tokens),
        )
        output = project_out(attn, merge_heads(mixed))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


class JvpWanAttention(WanAttnProcessor):
    """Wan's self-attention, and its attention to text and, in image-to-video, to the tokens of an image.

    Args:
        mask: which tokens see which in self-attention; None is all. A call of the attention module may give its own as
            the keyword `mask`.
    """

    def __init__(self, mask: AttentionMask | None = None) -> None:
        super().__init__()
        self.mask = mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """Video tokens [B, M, D]; `rotary_emb` are cosines and sines [1, M, 1, d].

        Raises:
            ValueError: a dense `attention_mask`, a mask on cross-attention, fused projections, or a diffusers backend
                or parallelism was asked for.
        """
        mask = self.mask if mask is None else mask
        self._refuse(attn, dense=attention_mask, mask=mask if encoder_hidden_states is not None else None)
        text, image = encoder_hidden_states, None
        if attn.add_k_proj is not None and text is not None:
            image, text = text.split([text.shape[1] - WAN_TEXT_TOKENS, WAN_TEXT_TOKENS], dim=1)
        tokens = hidden_states if text is None else text
        # Wan's norms run over the width of all heads together, and its heads are turned before the tokens are moved.
        query, key, value = (
            x.unflatten(2, (attn.heads, -1))
            for x in (attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(tokens)), attn.to_v(tokens))
        )
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = attention(query, key, value, mask=mask)
        if image is not None:
            mixed = mixed + attend_to_image(attn, query, image)
        return project_out(attn, merge_heads(mixed))

    def _refuse(self, attn: Any, *, dense: Tensor | None, mask: AttentionMask | None) -> None:
        if dense is not None:
            raise ValueError("Wan's attention takes an AttentionMask as `mask`, not a dense attention_mask")
        if mask is not None:
            raise ValueError("an AttentionMask is for Wan's self-attention: set it on the processors of attn1 alone")
        if attn.fused_projections:
            raise ValueError("Wan's projections are fused: call the network's unfuse_qkv_projections() first")
        if self._attention_backend is not None or self._parallel_config is not None:
            raise ValueError(
                f"the attention backend {self._attention_backend} or context parallelism of diffusers was set, and "
                "this processor computes attention itself: call the network's reset_attention_backend(), or do without "
                "context parallelism"
            )


def attend_to_image(attn: Any, query: Tensor, image: Tensor) -> Tensor:
    """Attention [B, H, M, d] of Wan's queries to the added keys of image tokens [B, N, D]."""
    key, value = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
    key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (key, value))
    return attention(query, key, value)


def merge_heads(mixed: Tensor) -> Tensor:
    """[B, H, M, d] as [B, M, H d]."""
    return mixed.transpose(1, 2).flatten(2)


def project_out(attn: Any, mixed: Tensor) -> Tensor:
    """The output layer of an attention module and its dropout."""
    return attn.to_out[1](attn.to_out[0](mixed))


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) of neighbouring pairs in [B, M, H, d]; [1, M, 1, d] has each angle twice.

    Stock code writes the halves into an empty tensor; without writes every step has a tangent.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosines, sines = cosines[..., 0::2], sines[..., 1::2]
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


def key_bias_of(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The bias [B or 1, N] of N keys from what a diffusers network hands to its attention.

    Raises:
        ValueError: the mask is no bias [B or 1, 1, N], so it depends on the query, or is of another length.
    """
    if attention_mask is None:
        return None
    batch, keys = tokens.shape[:2]
    fits = attention_mask.ndim == 3 and attention_mask.shape[1:] == (1, keys) and attention_mask.shape[0] in (1, batch)
    if not fits or not attention_mask.is_floating_point():
        raise ValueError(
            f"the attention mask must be a bias [{batch} or 1, 1, {keys}] on the keys, got {attention_mask.dtype} of "
            f"shape {tuple(attention_mask.shape)}: give the network a mask [{batch}, {keys}] of its text, 1 to keep"
        )
    return attention_mask[:, 0]


def key_biased_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + bias) v, [B, H, M, d].

    With a tangent the kernels add the bias to their scores; without one, and while torch.compile traces, it becomes
    columns of the keys that meet ones in the queries, for attention that knows of no bias.

    Args:
        query: [B, H, M, d].
        key: [B, H, N, d].
        value: [B, H, N, d].
        bias: [B or 1, N], or None for no bias. It gets no gradient and is taken to have no tangent.
        scale: None is 1 / sqrt(d).
    """
    if bias is None:
        return attention(query, key, value, scale=scale)
    if torch.compiler.is_compiling() or is_batched(bias):
        # A mask is a constant, in a compiled graph and of all batches of a vmap.
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        query, key = with_bias_columns(query, key, bias, factor)
        return attention(query, key, value, scale=factor)
    mask = unmasked(query.shape[2], key.shape[2], query.device).with_key_bias(
        forward_ad.unpack_dual(bias).primal.detach()
    )
    return attention(query, key, value, mask=mask, scale=scale)
