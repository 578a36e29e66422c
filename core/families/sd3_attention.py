"""Joint attention of SD3 in which one text token can stand for many identical ones."""

# diffusers says FloatTensor where it takes any tensor.
# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional


class KeyBiasJointAttention(JointAttnProcessor2_0):
    """The stock processor plus `key_bias` [N], a number added to the attention logits of each text key.

    n identical keys with identical values weigh as much in a softmax as one of them whose logit is raised by log n.
    Text tokens of SD3 have no position, so identical ones stay identical through all blocks and the shortened sequence
    gives the same picture, not an approximation. Without a bias, and in the image-only attention of SD3.5, the stock
    code runs.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Image tokens [B, M, D] and text tokens [B, N, D] after one joint attention."""
        if key_bias is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        query, key, value = joint_projections(attn, hidden_states, encoder_hidden_states)
        # The image keys come first and stand for one token each.
        bias = functional.pad(key_bias, (hidden_states.shape[1], 0)).to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.view(1, 1, 1, -1))
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        image, text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        # to_out is a linear layer and a dropout; the last block has no use for text, hence no projection of it.
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def joint_projections(attn: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, of image then text tokens: [B, heads, M + N, width of a head] each."""
    layers = (
        (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
        (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
        (attn.to_v, None, attn.add_v_proj, None),
    )
    query, key, value = (
        torch.cat([split_heads(attn, image, to, norm), split_heads(attn, text, add, added_norm)], dim=2)
        for to, norm, add, added_norm in layers
    )
    return query, key, value


def split_heads(attn: Any, tokens: Tensor, projection: torch.nn.Module, norm: torch.nn.Module | None) -> Tensor:
    """One projection of tokens [B, N, D] as [B, heads, N, width of a head]."""
    projected = projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return projected if norm is None else norm(projected)
