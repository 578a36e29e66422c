"""Attention under vmap and what is made of it, and what no transform can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention, attention_with_lse
from fewstep.kernels.attention_reference import attention_reference
from tests.kernels.attention_cases import close, distance, leaves, triple
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [-torch.inf, -1e9, -1e4])
def test_a_row_of_which_all_keys_are_hidden_is_as_if_none_was(dtype: torch.dtype, hidden: float) -> None:
    """By columns and by the kernel: outputs, tangents and gradients of a sample whose text is masked as a whole."""
    _, (q, k, v), (tq, _, _) = inputs_of_kind("none")
    bias = torch.zeros(len(q), k.shape[2], dtype=torch.float64)
    bias[0] = hidden
    masked = masks.full(q.shape[2], k.shape[2]).with_key_bias(bias)
    points = [x.to(dtype) for x in (q, k, v)]
    exact = attention_reference(q, k, v, mask=masks.full(q.shape[2], k.shape[2])).output
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-3}.get(dtype, 3e-2)
    for backend in ("auto", "tiled"):
        ready = leaves((points[0], points[1], points[2]))
        output = attention(*ready, mask=masked, backend=backend)
        assert distance(output, exact) < tolerance, backend
        (gradient,) = torch.autograd.grad(output.sum(), ready[2])
        assert float(gradient[0].double().sum()) == pytest.approx(float(gradient[1].double().sum()), rel=tolerance)
    tangent = torch.func.jvp(lambda x: attention(x, k, v, mask=masked), (q,), (tq,))[1]
    plain = torch.func.jvp(lambda x: attention(x, k, v, mask=masks.full(q.shape[2], k.shape[2])), (q,), (tq,))[1]
    assert distance(tangent, plain) < 1e-9


def test_a_bias_is_a_constant_that_nothing_drops() -> None:
    _, (q, k, v), _ = inputs_of_kind("causal")
    ranges = masks.causal(q.shape[2])
    bias = torch.linspace(-2, 2, k.shape[2], dtype=torch.float64)[None].repeat(len(q), 1)
    biased = ranges.with_key_bias(bias)
    close(attention(q, k, v, mask=biased, scale=0.0), attention(q, k, v, mask=biased, scale=0.0, backend="tiled"))
    kept = biased.with_activity(queries=None, keys=torch.zeros(k.shape[2], dtype=torch.bool)).key_bias
    assert kept is not None
    assert torch.equal(kept, bias)
    # A bias in fp32 is no reason to compute the rest in it.
    narrow = ranges.with_key_bias(bias.float())
    exact = attention_reference(q, k, v, mask=ranges.with_key_bias(bias.float().double())).output
    assert distance(attention(q, k, v, mask=narrow, backend="tiled"), exact) < 1e-14
    for call in (
        lambda b: torch.func.jvp(lambda row: attention(q, k, v, mask=ranges.with_key_bias(row)), (b,), (b,)),
        lambda b: torch.func.vmap(lambda row: attention(q, k, v, mask=ranges.with_key_bias(row)))(b[None]),
    ):
        with pytest.raises(ValueError, match="key_bias carries a tangent, or batches of a vmap"):
            call(bias)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="key_bias carries a tangent"):
        ranges.with_key_bias(forward_ad.make_dual(bias, bias))
    with pytest.raises(ValueError, match=rf"mask is for {len(q)} samples each"):
        torch.func.vmap(lambda x: attention_with_lse(x, k, v, mask=biased)[0])(q[None])
    nothing: Any = None
    with pytest.raises(ValueError, match="key_bias is NoneType"):
        ranges.with_key_bias(nothing)
