"""Eager differentiation of the public function: every way torch has to take tangents and gradients, against float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fewstep.kernels import mask as masks
from fewstep.kernels.attention import attention, attention_jvp, attention_jvp_with_grad, attention_with_lse
from fewstep.kernels.attention_ops import attention_jvp_op, attention_op
from fewstep.kernels.attention_reference import attention_jvp_reference, attention_reference
from fewstep.kernels.mask import AttentionMask
from tests.kernels.attention_cases import MASKS, Triple, close, draw, leaves, triple

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]
Scenario = Callable[[Attend, Triple, Triple], Pair]
KINDS = ("none", "causal", "block_causal", "teacher_forcing_constant", "holes")
# What checkpointing keeps instead of computing it again.
KEPT = (torch.ops.fewstep.attention_jvp.default,)


def mask_of_kind(kind: str) -> AttentionMask | None:
    return None if kind == "none" else MASKS[kind]()


def inputs_of_kind(kind: str, seed: int = 0) -> tuple[AttentionMask | None, Triple, Triple]:
    mask = mask_of_kind(kind)
    inputs = draw(masks.full(12, 15) if mask is None else mask, seed=seed)
    return mask, inputs.primals, inputs.tangents


def by_func_jvp(attend: Attend, primals: Triple, tangents: Triple) -> Pair:
    return torch.func.jvp(attend, primals, tangents)[:2]


def by_dual_level(attend: Attend, primals: Triple, tangents: Triple) -> Pair:
    with forward_ad.dual_level():
        duals = triple(forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True))
        result = forward_ad.unpack_dual(attend(*duals))
        assert result.tangent is not None
        return result.primal, result.tangent


def with_some_tangents(attend: Attend, primals: Triple, tangents: Triple) -> Pair:
    q, k, v = primals
    return torch.func.jvp(lambda k: attend(q, k, v), (k,), (tangents[1],))[:2]


def in_a_chain(attend: Attend, primals: Triple, tangents: Triple) -> Pair:
    """Linear layers and tanh before and after."""
    torch.manual_seed(1)
    before, after = (torch.nn.Linear(n, n, dtype=torch.float64) for n in (6, 5))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return after(attend(before(q).tanh(), before(k), v.tanh())).tanh()

    return torch.func.jvp(block, primals, tangents)[:2]


def in_a_checkpoint(attend: Attend, primals: Triple, tangents: Triple) -> Pair:
    def block(*parts: Tensor) -> Pair:
        return torch.func.jvp(attend, parts[:3], parts[3:])[:2]

    return checkpoint(block, *primals, *tangents, use_reentrant=False)


def in_a_selective_checkpoint(attend: Attend, primals: Triple, tangents: Triple) -> Pair:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*parts: Tensor) -> Pair:
        return torch.func.jvp(lambda q, k, v: attend(q.sin(), k, v).sin(), parts[:3], parts[3:])[:2]

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    return checkpoint(block, *primals, *tangents, use_reentrant=False, context_fn=contexts)


SCENARIOS: tuple[Scenario, ...] = (
    by_func_jvp,
    by_dual_level,
    with_some_tangents,
    in_a_chain,
    in_a_checkpoint,
    in_a_selective_checkpoint,
)


def both(kind: str, *, tangent_grad: bool = False) -> tuple[Attend, Attend]:
    """Ours and the reference."""
    mask = mask_of_kind(kind)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, scale=0.3, tangent_grad=tangent_grad)

    return ours, lambda q, k, v: attention_reference(q, k, v, mask=mask, scale=0.3).output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tangent_without_grad(scenario: Scenario, kind: str) -> None:
    _, primals, tangents = inputs_of_kind(kind)
    ours, exact = both(kind)
    with torch.no_grad():
        results = [scenario(attend, primals, tangents) for attend in (ours, exact)]
    assert results[0][1].norm() > 0.1
    for mine, theirs in zip(*results, strict=True):
        assert not mine.requires_grad
        close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradient_of_the_output_with_a_detached_tangent(scenario: Scenario, kind: str) -> None:
    _, primals, tangents = inputs_of_kind(kind)
    grads = []
    for attend in both(kind):
        points = leaves(primals)
        output, tangent = scenario(attend, points, tangents)
        grads.append(torch.autograd.grad((output.sin() * tangent.detach()).sum(), points))
    for mine, theirs in zip(*grads, strict=True):
        assert theirs.norm() > 0.01
        close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradient_through_the_tangent(scenario: Scenario, kind: str) -> None:
    _, primals, tangents = inputs_of_kind(kind)
    grads = []
    for attend in both(kind, tangent_grad=True):
        points, directions = leaves(primals), leaves(tangents)
        output, tangent = scenario(attend, points, directions)
        loss = (output.sin() * tangent).sum() + tangent.square().sum()
        grads.append(torch.autograd.grad(loss, (*points, *directions), allow_unused=True))
    used = 0
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            used += 1
            close(mine, theirs)
    assert used == (4 if scenario is with_some_tangents else 6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_gradient_at_a_constant_tangent_is_an_error(scenario: Scenario) -> None:
    _, primals, tangents = inputs_of_kind("causal")
    points = leaves(primals)
    output, tangent = scenario(both("causal")[0], points, tangents)
    with pytest.raises(ValueError, match=r"arrives at the tangent.*detach\(\).*tangent_grad=True"):
        torch.autograd.grad((output + tangent).sum(), points)


def test_backward_inside_the_dual_level() -> None:
    mask, primals, tangents = inputs_of_kind("block_causal")
    grads = []
    for attend in both("block_causal", tangent_grad=True):
        points = leaves(primals)
        with forward_ad.dual_level():
            duals = triple(forward_ad.make_dual(x, t) for x, t in zip(points, tangents, strict=True))
            output, tangent = forward_ad.unpack_dual(attend(*duals))
            assert tangent is not None
            grads.append(torch.autograd.grad((output * tangent).sum(), points))
    assert mask is not None
    for mine, theirs in zip(*grads, strict=True):
        close(mine, theirs)


class Calls(TorchDispatchMode):
    """Counts calls of the forward operator with tangents."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in KEPT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scenario", "expected"), [(in_a_checkpoint, 2), (in_a_selective_checkpoint, 1)])
def test_selective_checkpoint_does_not_compute_attention_again(scenario: Scenario, expected: int) -> None:
    _, primals, tangents = inputs_of_kind("causal")
    points = leaves(primals)
    with Calls() as calls:
        output, tangent = scenario(both("causal")[0], points, tangents)
        torch.autograd.grad((output * tangent.detach()).sum(), points)
    assert calls.count == expected


@pytest.mark.skipif(torch.__version__ < "2.15", reason="torch 2.11 refuses it aloud")
@torch.no_grad()
def test_jvp_of_a_checkpoint_without_grad() -> None:
    _, primals, tangents = inputs_of_kind("block_causal")
    ours, exact = both("block_causal")
    mine = torch.func.jvp(lambda *parts: checkpoint(ours, *parts, use_reentrant=False), primals, tangents)
    for got, wanted in zip(mine, torch.func.jvp(exact, primals, tangents), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("kind", ["none", "causal", "holes"])
@pytest.mark.parametrize("part", [0, 1], ids=["output", "tangent"])
def test_func_grad_of_attention_and_of_its_jvp(part: int, kind: str) -> None:
    _, primals, tangents = inputs_of_kind(kind)
    found = []
    for attend in both(kind, tangent_grad=True):

        def loss(q: Tensor, k: Tensor, v: Tensor, attend: Attend = attend) -> Tensor:
            return torch.func.jvp(attend, (q, k, v), tangents)[part].sin().sum()

        def plain(q: Tensor, k: Tensor, v: Tensor, attend: Attend = attend) -> Tensor:
            return attend(q, k, v).sin().sum()

        found.append((*torch.func.grad(loss, (0, 1, 2))(*primals), *torch.func.grad(plain, (0, 1, 2))(*primals)))
    assert len(found[0]) == 6
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)], ids=str)
def test_gradcheck(heads: tuple[int, int]) -> None:
    mask = masks.from_predicate(lambda i, j: (j <= i) & (i != 1) & (j != 2), 4, 5)
    inputs = draw(mask, heads=heads, widths=(3, 2), batch=1)
    seen = torch.tensor([0, 2, 3])

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Pair:
        output, lse = attention_with_lse(q, k, v, mask=mask)
        return output, lse[:, :, seen]

    def pair(*parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, tq, tk, tv = parts
        result = attention_jvp_with_grad(q, k, v, tq, tk, tv, mask=mask)
        assert result.tangent is not None
        return result.output, result.lse[:, :, seen], result.tangent

    points, directions = inputs.leaves()
    assert torch.autograd.gradcheck(plain, points) is True
    assert torch.autograd.gradcheck(pair, (*points, *directions)) is True


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_pair_equals_the_reference(kind: str) -> None:
    mask, primals, tangents = inputs_of_kind(kind)
    result = attention_jvp(*primals, *tangents, mask=mask)
    exact = attention_jvp_reference(*primals, *tangents, mask=mask)
    for name in ("output", "lse", "tangent", "mean"):
        close(getattr(result, name), getattr(exact, name))
    nothing = attention_jvp(*primals, None, None, None, mask=mask)
    close(nothing.output, exact.output)
    assert nothing.tangent is not None
    assert nothing.mean is not None
    assert nothing.tangent.shape == exact.output.shape
    assert nothing.tangent.count_nonzero() == nothing.mean.count_nonzero() == 0


def test_gradients_of_lse_and_of_the_mean() -> None:
    mask, primals, tangents = inputs_of_kind("block_causal")
    points, directions = leaves(primals), leaves(tangents)
    result = attention_jvp(*points, *directions, mask=mask)
    exact_points = leaves(primals)
    exact = attention_reference(*exact_points, mask=mask)
    mine = torch.autograd.grad(result.lse.sin().sum(), points, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(exact.lse.sin().sum(), exact_points, allow_unused=True)
    for got, wanted in zip(mine[:2], theirs[:2], strict=True):
        close(got, wanted)
    assert mine[2] is not None
    assert mine[2].count_nonzero() == 0
    assert result.mean is not None
    with pytest.raises(ValueError, match="arrives at the tangent"):
        torch.autograd.grad(result.mean.sum(), points)
    free = attention_jvp_with_grad(*points, *directions, mask=mask)
    assert free.mean is not None
    with pytest.raises(ValueError, match="tangent of the log-sum-exp"):
        torch.autograd.grad(free.mean.sum(), points)


@pytest.mark.parametrize("kind", ["none", "block_causal"])
def test_second_derivatives_are_refused(kind: str) -> None:
    inputs = draw(MASKS["block_causal"](), widths=(4, 4))
    (q, k, v), (tq, _, _) = inputs.primals, inputs.tangents
    attend, _ = both(kind)

    def jvp(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda y: attend(y, k, v), (x,), (tq,))[1]

    def grad(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: attend(y, k, v).sin().sum())(x)

    for function in (jvp, grad):
        with pytest.raises(NotImplementedError, match="has no tangent of its tangent or gradient"):
            torch.func.jvp(function, (q,), (tq,))
    with pytest.raises(RuntimeError, match=r"gradient of its gradient|backward is not implemented"):
        torch.autograd.functional.jvp(lambda x: attend(x, k, v), q, tq)
    point = q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"gradient of its gradient|backward is not implemented"):
        torch.autograd.grad(
            torch.autograd.grad(attend(point, k, v).sin().sum(), point, create_graph=True)[0].sum(), point
        )


def test_double_backward_through_the_tangent_is_refused() -> None:
    _, (q, k, v), (tq, _, _) = inputs_of_kind("causal")
    attend, _ = both("causal", tangent_grad=True)
    point = q.clone().requires_grad_()
    tangent = torch.func.jvp(lambda y: attend(y, k, v), (point,), (tq,))[1]
    (grad,) = torch.autograd.grad(tangent.square().sum(), point, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"SDPBackend\.MATH"):
        torch.autograd.grad(grad.sum(), point)


def test_the_trap_that_the_public_function_avoids() -> None:
    """If an operator ever gets forward mode, the taking apart of dual tensors can go."""
    mask, (q, k, v), tangents = inputs_of_kind("causal")
    assert mask is not None
    arguments = (mask.handle, 0.3, "tiled")
    tangent = torch.func.jvp(lambda x: attention_op(x, k, v, *arguments)[0], (q,), (tangents[0],))[1]
    assert tangent.count_nonzero() == 0
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, tangents[0])
        assert forward_ad.unpack_dual(attention_op(dual, k, v, *arguments)[0]).tangent is None
        assert forward_ad.unpack_dual(attention_jvp_op([dual, k, v], *tangents, *arguments)[0]).tangent is None
        tangent = forward_ad.unpack_dual(attention(dual, k, v, mask=mask)).tangent
    assert tangent is not None
    assert tangent.norm() > 1


def test_explicit_pair_refuses_dual_inputs() -> None:
    mask, (q, k, v), (tq, tk, _) = inputs_of_kind("causal")
    for place, name in enumerate(("q", "k", "v", "tq")):
        parts = [q, k, v, tq]

        def pair(x: Tensor, place: int = place, parts: list[Tensor] = parts) -> Tensor:
            a, b, c, d = (*parts[:place], x, *parts[place + 1 :])
            return attention_jvp(a, b, c, d, None, None, mask=mask).output

        with pytest.raises(ValueError, match=f"^{name} carries a forward-mode tangent.*Call attention"):
            torch.func.jvp(pair, (parts[place],), (torch.ones_like(parts[place]),))
    inside = torch.func.jvp(
        lambda x: x * attention_jvp(q, k, v, tq, tk, None, mask=mask).output, (v[:1, :1, :1],), (v[:1, :1, :1],)
    )
    assert inside[1].norm() > 1


def test_backward_works_after_the_mask_was_dropped() -> None:
    _, primals, tangents = inputs_of_kind("block_causal")
    points, exact_points = leaves(primals), leaves(primals)
    attend, exact = both("block_causal", tangent_grad=True)
    output, tangent = by_func_jvp(attend, points, tangents)
    plain = attend(*points)
    del attend
    gc.collect()
    mine = torch.autograd.grad((output * tangent).sum() + plain.sin().sum(), points)
    output, tangent = by_func_jvp(exact, exact_points, tangents)
    theirs = torch.autograd.grad((output * tangent).sum() + exact(*exact_points).sin().sum(), exact_points)
    for got, wanted in zip(mine, theirs, strict=True):
        close(got, wanted)
