"""What jvp-flash-attention 0.12 is checked by, as far as masks can be expressed here: dual numbers and func.jvp against
the stock attention by its definition, with the gradient of a mean square, at 12 heads of 64 and its bounds.

Its random masks for each pair of tokens and each head cannot be expressed; in their place stand keys that are hidden
and biases for each key, which its users have for text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention
from fewstep.kernels.mask import AttentionMask

BATCH, HEADS, WIDTH = 2, 12, 64
# Bounds of outputs and tangents, of the loss, and of gradients.
OUTPUT, LOSS, GRADIENT = 4e-3, 5e-4, 5e-4
# Half precision rounds an output of the size of 1 by its own eps; theirs are held for fp32 and fp16.
ROUNDING = {torch.float32: 1e-5, torch.float16: OUTPUT, torch.bfloat16: 3.2e-2}
KINDS = ("none", "causal", "hidden keys", "key bias")
Results: TypeAlias = dict[str, Tensor]
Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def masks_of(kind: str, tokens: int, dtype: torch.dtype) -> tuple[AttentionMask | None, Tensor | None]:
    """Ours, and the same as numbers that are added to scores, [B, 1, M, N] or [M, N]."""
    generator = torch.Generator().manual_seed(1042)
    if kind == "causal":
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        return masks.causal(tokens), torch.zeros(tokens, tokens, dtype=dtype).masked_fill(hidden, -torch.inf)
    if kind == "hidden keys":
        counts = torch.tensor([tokens, max(1, tokens // 10)])
        hidden = torch.arange(tokens)[None] >= counts[:, None]
        theirs = torch.zeros(BATCH, 1, 1, tokens, dtype=dtype).masked_fill(hidden[:, None, None], -torch.inf)
        return masks.lengths(counts, queries=tokens, keys=tokens), theirs
    if kind == "key bias":
        bias = torch.randn(BATCH, tokens, generator=generator)
        bias[:, ::3] = -torch.inf
        return masks.full(tokens).with_key_bias(bias), bias[:, None, None].to(dtype)
    return None, None


def inputs(tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Query, key and value, their tangents, and a target."""
    generator = torch.Generator().manual_seed(42)
    drawn = [torch.randn(BATCH, HEADS, tokens, WIDTH, generator=generator).to(dtype) for _ in range(7)]
    return drawn[:3], drawn[3:6], drawn[6]


def by_dual_numbers(attend: Attend, primals: list[Tensor], tangents: list[Tensor], target: Tensor) -> Results:
    """Output, tangent, loss and gradients, the backward inside of the level of the dual numbers."""
    with forward_ad.dual_level():
        leaves = [x.clone().requires_grad_() for x in primals]
        out = attend(*(forward_ad.make_dual(x, dx) for x, dx in zip(leaves, tangents, strict=True)))
        dual: Any = forward_ad.unpack_dual(out)
        primal, tangent = dual.primal, dual.tangent
        assert tangent is not None
        loss = (primal - target).square().mean()
        loss.backward()
    return collected(primal, tangent, loss, leaves)


def by_func(attend: Attend, primals: list[Tensor], tangents: list[Tensor], target: Tensor) -> Results:
    """The same by torch.func.jvp."""
    leaves = [x.clone().requires_grad_() for x in primals]
    found: Any = torch.func.jvp(attend, tuple(leaves), tuple(tangents))
    primal, tangent = found
    loss = (primal - target).square().mean()
    loss.backward()
    return collected(primal, tangent, loss, leaves)


def collected(primal: Tensor, tangent: Tensor, loss: Tensor, leaves: list[Tensor]) -> Results:
    grads = {name: x.grad for name, x in zip("qkv", leaves, strict=True) if x.grad is not None}
    assert len(grads) == 3
    return {"output": primal.detach(), "tangent": tangent.detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [32, 64, 256])
def test_outputs_tangents_and_gradients_are_those_of_the_definition(tokens: int, kind: str, dtype: torch.dtype) -> None:
    primals, tangents, target = inputs(tokens, dtype)
    mine, theirs = masks_of(kind, tokens, torch.float32)
    wide = [x.float() for x in primals]
    with sdpa_kernel(SDPBackend.MATH):
        exact = by_dual_numbers(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=theirs),
            wide,
            [x.float() for x in tangents],
            target.float(),
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=mine)

    for found in (by_dual_numbers(attend, primals, tangents, target), by_func(attend, primals, tangents, target)):
        for name, bound in (("output", ROUNDING[dtype]), ("tangent", 2 * ROUNDING[dtype])):
            assert float((found[name].float() - exact[name]).abs().max()) < bound, name
        assert float((found["loss"].float() - exact["loss"]).abs()) < LOSS * (1 if dtype != torch.bfloat16 else 16)
        for name in "qkv":
            assert found[name].dtype == dtype
            assert float((found[name].float() - exact[name]).abs().max()) < GRADIENT, name
