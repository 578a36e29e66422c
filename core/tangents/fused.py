"""Stock attention processors whose fused attention has a tangent, whatever else they compute.

Every processor of diffusers' attention dispatcher ends in `torch.nn.functional.scaled_dot_product_attention`. Inside a
call of such a processor that function is answered by this package's attention; projections, norms, rotary positions and
joins of text and image stay stock code. The exchange lies within the block, so a checkpointed block does the same when
it is computed again.

Legend: B batch, H heads, M queries, N keys, d width of a head.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewstep.core.tangents.processors import key_biased_attention

FUSED_TANGENT = "_has_fused_tangent"
# The bias of a key that is not looked at: its weight is exactly 0.
MASKED = -1e4


class AttentionWithTangents(TorchFunctionMode):
    """Answers torch's fused attention by one with a tangent."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any other function as it is."""
        if func is functional.scaled_dot_product_attention:
            return fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def with_fused_tangent(processor: Any) -> Any:
    """A stock processor, of a subclass of its own class, that runs within `AttentionWithTangents`."""
    own = copy.copy(processor)
    own.__class__ = _with_tangent(type(processor))
    return own


@functools.cache
def _with_tangent(kind: type) -> type:
    # Attention modules look at the signature to learn which arguments a processor takes.
    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with AttentionWithTangents():
            return kind.__call__(self, *args, **kwargs)

    return type(f"Jvp{kind.__name__}", (kind,), {"__call__": call, FUSED_TANGENT: True})


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's `scaled_dot_product_attention` [B, H, M, d] with a tangent.

    A mask of the keys alone goes into the kernel as a bias. One that differs between queries, as the refiners of a text
    have it, is computed in plain torch at M N numbers; queries without any key give 0 there.

    Raises:
        ValueError: dropout, or a causal mask, was asked for.
    """
    if dropout_p > 0 or is_causal:
        raise ValueError(
            f"attention with dropout {dropout_p} or a causal mask ({is_causal}) has no tangent here: put the network "
            "into eval mode, or take the tangent by finite differences"
        )
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, dim=-3) for x in (key, value))
    if attn_mask is None:
        return key_biased_attention(query, key, value, None, scale=scale)
    bias = attn_mask
    if attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, MASKED)
    if bias.ndim == 4 and bias.shape[2] == 1 and torch.equal(bias, bias[:, :1].expand_as(bias)):
        return key_biased_attention(query, key, value, bias[:, 0, 0], scale=scale)
    return _dense_attention(query, key, value, attn_mask, bias, scale)


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, scale: float | None
) -> Tensor:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    weights = (query @ key.transpose(-1, -2) * factor + bias).softmax(dim=-1)
    if mask.dtype == torch.bool:
        weights = weights * mask
    return weights @ value
