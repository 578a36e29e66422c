"""The public functions inside torch.compile, in one graph: the same numbers as in eager mode, or an error."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from fewstep.kernels import attention_ops
from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention, attention_jvp, attention_jvp_with_grad, attention_with_lse
from fewstep.kernels.mask import AttentionMask
from tests.kernels.attention_cases import MASKS, Inputs, close, draw, leaves, triple

INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler"),
    ],
)
BACKENDS = ["aot_eager", INDUCTOR]
KINDS = ["none", "causal", "block_causal", "teacher_forcing_constant"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def inputs_of_kind(kind: str) -> tuple[AttentionMask | None, Inputs]:
    inputs = draw(masks.full(14, 11) if kind == "none" else MASKS[kind]())
    return None if kind == "none" else inputs.mask, inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "aot_eager") for kind in KINDS), pytest.param("causal", *INDUCTOR.values, marks=INDUCTOR.marks)],
)
def test_jvp_equals_eager(kind: str, backend: str) -> None:
    mask, inputs = inputs_of_kind(kind)

    def jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.func.jvp(lambda *x: attention(*x, mask=mask), (q, k, v), inputs.tangents)

    for grad_enabled in (False, True):
        with torch.set_grad_enabled(grad_enabled):
            (output, tangent), eager = compiled(jvp, backend)(*inputs.primals), jvp(*inputs.primals)
        assert tangent.norm() > 1
        close(output, eager[0])
        close(tangent, eager[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("none", "aot_eager"),
        ("block_causal", "aot_eager"),
        pytest.param("none", *INDUCTOR.values, marks=INDUCTOR.marks),
    ],
)
def test_training_step_in_one_graph(kind: str, backend: str) -> None:
    mask, inputs = inputs_of_kind(kind)
    before, after = (torch.nn.Linear(n, n, dtype=torch.float64) for n in (6, 5))

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def network(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return after(attention(before(q), k.tanh(), v, mask=mask)).tanh()

        output, tangent = torch.func.jvp(network, (q, k, v), inputs.tangents)[:2]
        return (output * tangent.detach()).sum()

    points = leaves(inputs.primals)
    places = (*points, before.weight, after.weight)
    eager, loss = step(*points), compiled(step, backend)(*points)
    close(loss, eager)
    for mine, theirs in zip(torch.autograd.grad(loss, places), torch.autograd.grad(eager, places), strict=True):
        assert theirs.norm() > 0.01
        close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_outside_of_the_graph(backend: str) -> None:
    mask, inputs = inputs_of_kind("block_causal")

    def jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.func.jvp(lambda *x: attention(*x, mask=mask).sin(), (q, k, v), inputs.tangents)

    points = leaves(inputs.primals)
    grads = []
    for function in (compiled(jvp, backend), jvp):
        output, tangent = function(*points)
        assert tangent.norm() > 1
        if function is not jvp:
            grads.append(torch.autograd.grad((output * tangent.detach()).sum(), points, retain_graph=True))
            with pytest.raises(ValueError, match="arrives at the tangent of attention"):
                torch.autograd.grad((output * tangent).sum(), points)
    wanted = leaves(inputs.primals)
    output = attention(*wanted, mask=mask).sin()
    theirs = torch.autograd.grad((output * jvp(*inputs.primals)[1]).sum(), wanted)
    for mine, right in zip(grads[0], theirs, strict=True):
        close(mine, right)


def test_a_gradient_at_a_constant_tangent_is_an_error() -> None:
    mask, inputs = inputs_of_kind("causal")
    points = leaves(inputs.primals)

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, tangent = torch.func.jvp(lambda *x: attention(*x, mask=mask), (q, k, v), inputs.tangents)[:2]
        return (output * tangent).sum()

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.func.jvp(lambda *x: attention(*x, mask=mask), (q, k, v), inputs.tangents)[1].sum()

    def explicit_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mean = attention_jvp(q, k, v, *inputs.tangents, mask=mask).mean
        assert mean is not None
        return mean.sum()

    for function in (mixed, alone, explicit_mean):
        loss = compiled(function)(*points)
        with pytest.raises(ValueError, match=r"arrives at the tangent.*inside the compiled function"):
            torch.autograd.grad(loss, points)


@pytest.mark.slow
def test_lse_and_the_explicit_pair() -> None:
    mask, inputs = inputs_of_kind("teacher_forcing_constant")

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, lse = attention_with_lse(q, k, v, mask=mask)
        return (output.sum(-1) * lse).sin().sum()

    def lse_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_jvp(q, k, v, *inputs.tangents, mask=mask).lse.sin().sum() + v.sum()

    def pair(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = attention_jvp(q, k, v, *inputs.tangents, mask=mask)
        assert result.tangent is not None
        assert result.mean is not None
        return (result.output * result.tangent.detach()).sum() + (result.lse * result.mean.detach()).sum()

    def output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask).sin().sum()

    for function in (plain, lse_alone, pair, output):
        points = leaves(inputs.primals)
        loss, eager = compiled(function)(*points), function(*points)
        close(loss, eager)
        for mine, theirs in zip(torch.autograd.grad(loss, points), torch.autograd.grad(eager, points), strict=True):
            close(mine, theirs)


@pytest.mark.slow
def test_masks_and_lengths_may_change_between_calls() -> None:
    @compiled
    def tangent(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, mask: AttentionMask) -> Tensor:
        return torch.func.jvp(lambda q: attention(q, k, v, mask=mask), (q,), (tq,))[1]

    built = [masks.causal(12), masks.documents([5, 7]), masks.full(12), masks.causal(19), masks.block_causal([9, 2])]
    for mask in (*built, built[1]):
        inputs = draw(mask)
        (q, k, v), tq = inputs.primals, inputs.tangents[0]
        eager = torch.func.jvp(lambda q, k=k, v=v, mask=mask: attention(q, k, v, mask=mask), (q,), (tq,))[1]
        assert eager.norm() > 1
        close(tangent(q, k, v, tq, mask), eager)


def test_a_mask_that_is_gone_is_missed_in_the_backward_pass() -> None:
    inputs = draw(masks.full(9))
    points = leaves(inputs.primals)

    @compiled
    def loss(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return attention(q, k, v, mask=mask).sin().sum()

    mask = masks.documents([4, 5])
    assert len(torch.autograd.grad(loss(*points, mask), points)) == 3
    kept = loss(*points, mask)
    del mask
    gc.collect()
    with pytest.raises(ValueError, match=r"No mask has the handle.*keep the AttentionMask alive"):
        torch.autograd.grad(kept, points)


def test_autocast_inside_and_outside_of_the_graph() -> None:
    inputs = draw(masks.block_causal([5, 7]), dtype=torch.float32)

    def jvp(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.jvp(lambda *x: attention(*x, mask=inputs.mask), (q, k, v), inputs.tangents)

    eager = jvp(*inputs.primals)
    for mine, theirs in zip(compiled(jvp)(*inputs.primals), eager, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch 2.11 refuses such layouts aloud")
def test_layouts() -> None:
    mask, inputs = inputs_of_kind("block_causal")
    laid = Inputs(
        triple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs.primals),
        triple(x.mT.contiguous().mT for x in inputs.tangents),
        inputs.mask,
    )

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, tangent = torch.func.jvp(lambda *x: attention(*x, mask=mask), (q, k, v), laid.tangents)[:2]
        return (output.transpose(1, 2).flatten(2) * tangent.detach().transpose(1, 2).flatten(2)).sum()

    for points in (leaves(laid.primals), leaves(inputs.primals)):
        mine = torch.autograd.grad(compiled(step)(*points), points)
        for got, wanted in zip(mine, torch.autograd.grad(step(*points), points), strict=True):
            close(got, wanted)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch 2.11 refuses these in other words")
def test_what_cannot_be_compiled_is_refused() -> None:
    mask, inputs = inputs_of_kind("causal")
    (q, k, v), (tq, tk, _) = inputs.primals, inputs.tangents

    def attend(x: Tensor) -> Tensor:
        return attention(x, k, v, mask=mask)

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(attend, (x,), (tq.sin(),))[1]

    def through_tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: attention(x, k, v, mask=mask, tangent_grad=True), (x,), (tq,))[1]

    def explicit(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: attention_jvp(x, k, v, tq, tk, None, mask=mask).output, (x,), (tq,))[1]

    def explicit_with_grad(x: Tensor) -> Tensor:
        return attention_jvp_with_grad(x, k, v, tq, tk, None, mask=mask).output

    def grad(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: attend(x).sum())(x)

    def sdpa(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: attention(x, k, v, backend="sdpa"), (x,), (tq,))[1]

    cases = [
        (lambda x: torch.func.jvp(tangent, (x,), (tq,))[1], "has no tangent of its tangent"),
        (
            lambda x: torch.func.jvp(
                lambda y: torch.func.jvp(lambda z: attend(y) * z.sum(), (y.sin(),), (y.cos(),))[0], (x,), (tq,)
            )[1],
            "no tangent of",
        ),
        (lambda x: torch.func.jvp(grad, (x,), (tq,))[1], "gradient|setup_context|autograd"),
        (torch.func.vmap(tangent), "vmap|batching|Batching"),
        (through_tangent, "gradient through the tangent of attention cannot be compiled"),
        (explicit_with_grad, "gradient through the tangent of attention cannot be compiled"),
        (explicit, "q carries a forward-mode tangent"),
        (sdpa, "'sdpa' has no tangent"),
    ]
    for function, message in cases:
        torch._dynamo.reset()
        with pytest.raises(Unsupported, match=message):
            compiled(function)(q)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.15", reason="before torch 2.15, inductor drops the tangent without a word")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_region_that_is_called_with_dual_tensors(backend: str) -> None:
    mask, inputs = inputs_of_kind("causal")
    (q, k, v), (tq, _, _) = inputs.primals, inputs.tangents

    def attend(x: Tensor) -> Tensor:
        return attention(x, k, v, mask=mask).sin()

    right = torch.func.jvp(attend, (q,), (tq,))[1]
    assert right.norm() > 1
    region, loose = compiled(attend, backend), torch.compile(attend, backend=backend)
    for function in (region, loose):
        close(function(q), attend(q))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tq)
        with pytest.raises(Unsupported, match="dual tensor"):
            region(dual)
        close(forward_ad.unpack_dual(loose(dual)).tangent, right)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch 2.11 cannot export forward mode, and says so")
def test_other_tracers_keep_the_tangent() -> None:
    mask, inputs = inputs_of_kind("block_causal")
    (q, k, v), (tq, _, _) = inputs.primals, inputs.tangents

    class Tangent(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: attention(x, k, v, mask=mask), (x,), (tq,))[1]

    other = q.flip(2)
    right, there = Tangent()(q), Tangent()(other)
    assert right.norm() > 1
    close(torch.func.linearize(lambda x: attention(x, k, v, mask=mask), q)[1](tq), right)
    close(make_fx(Tangent())(q)(other), there)
    close(torch.export.export(Tangent(), (q,)).module()(other), there)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["none", "teacher_forcing_constant"])
def test_operators_keep_their_contract_with_torch(kind: str, transposed: bool) -> None:
    mask, inputs = inputs_of_kind(kind)
    parts = [x.mT.contiguous().mT if transposed else x for x in (*inputs.primals, *inputs.tangents)]
    call = (attention_ops.NO_MASK if mask is None else mask.handle, 0.3, "tiled")
    output, lse, tangent, mean = attention_ops.attention_jvp_op(parts[:3], *parts[3:], *call)
    saved = [*parts[:3], output, lse]
    points = leaves(inputs.primals)
    opcheck(attention_ops.attention_op, (*parts[:3], *call))
    opcheck(attention_ops.attention_traced_op, (*points, *call))
    opcheck(attention_ops.attention_jvp_op, (parts[:3], parts[3], None, parts[5], *call))
    opcheck(attention_ops.attention_backward_op, (saved, tangent, mean, *call))
    opcheck(attention_ops.attention_backward_checked_op, (saved, tangent, None, [mean * 0], *call))
    found = attention_ops.attention_backward_op(saved, tangent, None, *call)
    assert [x.is_contiguous() for x in found] == [True] * 3
    with pytest.raises(ValueError, match="arrives at the tangent"):
        attention_ops.attention_backward_checked_op(saved, tangent, None, [tangent * 0, mean], *call)
