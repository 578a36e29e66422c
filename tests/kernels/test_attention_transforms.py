"""Attention under vmap and what is made of it, and what no transform can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention
from tests.kernels.attention_cases import close, leaves, triple
from tests.kernels.test_attention_autograd import KINDS, Attend, both, inputs_of_kind


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_a_vmap_join_the_batch(kind: str) -> None:
    """Outputs, tangents and gradients of several inputs at once are those of each."""
    _, primals, (tq, _, _) = inputs_of_kind(kind)
    attend, exact = both(kind)
    q, k, v = primals
    stack, values = torch.stack((q, 2 * q, -q)), torch.stack((v, v.flip(2), 0.5 * v), dim=2)

    def tangent(x: Tensor, call: Attend) -> Tensor:
        return torch.func.jvp(lambda y: call(y, k, v), (x,), (tq,))[1]

    mine, theirs = (torch.func.vmap(call, in_dims=(0, None, 2))(stack, k, values) for call in (attend, exact))
    close(mine, theirs)
    close(torch.func.vmap(lambda x: tangent(x, attend))(stack), torch.stack([tangent(x, exact) for x in stack]))

    def row(x: Tensor, call: Attend) -> Tensor:
        return call(x[None], k[:1], v[:1])[:, 0].sum(dim=-1)

    for jacobian in (torch.func.jacfwd, torch.func.jacrev):
        found, wanted = (jacobian(row)(q[0], call) for call in (attend, exact))
        close(found, wanted)


def test_a_vmap_that_cannot_be_says_what_to_do() -> None:
    _, (q, k, v), (tq, _, _) = inputs_of_kind("causal")
    attend, _ = both("causal")
    with pytest.raises(NotImplementedError, match=r"Put the jvp inside of the vmap"):
        torch.func.jvp(torch.func.vmap(lambda x: attend(x, k, v)), (q[None],), (tq[None],))
    each = masks.lengths(torch.full((q.shape[0],), 3), queries=q.shape[2], keys=k.shape[2])
    with pytest.raises(ValueError, match=r"vmap over attention whose mask is for \d samples each"):
        torch.func.vmap(lambda x: attention(x, k, v, mask=each))(q[None])


def test_a_tensor_as_a_mask_is_named() -> None:
    _, (q, k, v), _ = inputs_of_kind("causal")
    tensor: Any = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask is a tensor of torch\.bool; attention takes ranges of keys"):
        attention(q, k, v, mask=tensor)


def test_a_backward_inside_of_a_dual_level_is_the_gradient_of_the_output() -> None:
    _, primals, tangents = inputs_of_kind("causal")
    attend, exact = both("causal")
    found = []
    for call in (attend, exact):
        points = leaves(primals)
        with forward_ad.dual_level():
            duals = triple(forward_ad.make_dual(x, t) for x, t in zip(points, tangents, strict=True))
            output = forward_ad.unpack_dual(call(*duals)).primal
            found.append(torch.autograd.grad(output.sin().sum(), points))
    for got, wanted in zip(*found, strict=True):
        close(got, wanted)
