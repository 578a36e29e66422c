"""Autograd of the attention operators: gradients of the output, of its tangent on request, and none lost in silence.

Eager calls go through `Function`s without a `jvp`, so that forward mode inside forward mode is an error and not a zero.
While torch.compile traces, AOT autograd differentiates the operator itself, so twins of the operators carry the same
gradients.

Legend: q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, E], output and tangent [B, H, Nq, E], lse and mean [B, H, Nq].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import Function

from fewstep.kernels.attention_ops import (
    NO_MASK,
    TANGENT_GRADIENT,
    attention_backward_checked_op,
    attention_backward_op,
    attention_jvp_op,
    attention_jvp_traced_op,
    attention_op,
    attention_tangent_backward_op,
    attention_traced_op,
)
from fewstep.kernels.mask import AttentionMask

MEAN_GRADIENT = (
    "A gradient arrives at the tangent of the log-sum-exp, which has none. Call .detach() on it, or use the tangent of "
    "the output alone."
)
NESTED_FORWARD_MODE = (
    "fewstep's attention has no tangent of its tangent or gradient. Where one is needed, use torch's own attention "
    "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
SECOND_DERIVATIVE = (
    "fewstep's attention has no gradient of its gradient. Where a loss needs one, use torch's own attention under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)


@dataclass(frozen=True)
class Call:
    """The arguments of an attention call that are no tensors; it keeps the mask alive until the gradient is taken.

    `path` is "tiled" or "triton".
    """

    mask: AttentionMask | None
    scale: float
    path: str

    def on(self, path: str) -> Call:
        """The same call by the kernels of `path`."""
        return Call(self.mask, self.scale, path)

    @property
    def plain(self) -> tuple[int, float, str]:
        """What operators take: the mask as its handle."""
        return (NO_MASK if self.mask is None else self.mask.handle), self.scale, self.path


class AttentionFunction(Function):
    """What all have in common: batches of a vmap join the batch, and forward mode is refused in our own words."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            return over_batches(cls, info.batch_size, in_dims, arguments)

        cls.vmap = staticmethod(vmap)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(NESTED_FORWARD_MODE)


def over_batches(function: Any, size: int, in_dims: Any, arguments: Any) -> Any:
    """The results of a `Function` whose arguments have `size` batches of a vmap, and the dimensions of those.

    Raises ValueError for a mask of each sample.
    """
    folded = []
    for argument, place in zip(arguments, in_dims, strict=True):
        mask = argument.mask if isinstance(argument, Call) else None
        samples = 1 if mask is None else max(mask.batch, 1 if mask.key_bias is None else len(mask.key_bias))
        if samples > 1:
            raise ValueError(
                f"vmap over attention whose mask is for {samples} samples each: build mask and key bias for one, which "
                "holds for all, or put the batches of the vmap into the batch yourself."
            )
        if isinstance(argument, Tensor):
            whole = argument.expand(size, *argument.shape) if place is None else argument.movedim(place, 0)
            argument = whole.flatten(0, 1)
        folded.append(argument)
    results = function.apply(*folded)
    apart = tuple(None if x is None else x.unflatten(0, (size, -1)) for x in results)
    return apart, tuple(None if x is None else 0 for x in apart)


class Attention(AttentionFunction):
    """(output, lse)."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return attention_op(q, k, v, *call.plain)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.call = inputs[3]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *gradients(ctx.saved_tensors, grads[0], grads[1], ctx.call), None


class AttentionJvp(AttentionFunction):
    """(output, lse, tangent, mean); a gradient that arrives at one of the last two is an error."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return attention_jvp_op([q, k, v], tq, tk, tv, *call.plain)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], *output[:2])
        ctx.call = inputs[6]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[2] is not None or grads[3] is not None:
            raise ValueError(TANGENT_GRADIENT)
        return *gradients(ctx.saved_tensors, grads[0], grads[1], ctx.call), None, None, None, None


class AttentionJvpWithGrad(AttentionFunction):
    """(output, lse, tangent, mean) whose tangent has a gradient too, with respect to primals and tangents."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return attention_jvp_op([q, k, v], tq, tk, tv, *call.plain)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:6], *output)
        ctx.call = inputs[6]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad_output, grad_lse, grad_tangent, grad_mean = grads
        if grad_mean is not None:
            raise ValueError(MEAN_GRADIENT)
        saved = ctx.saved_tensors
        if grad_tangent is None:
            primals = (*saved[:3], *saved[6:8])
            return *gradients(primals, grad_output, grad_lse, ctx.call), None, None, None, None
        return *TangentBackward.apply(*saved, grad_output, grad_lse, grad_tangent, ctx.call), None


class Backward(AttentionFunction):
    """Gradients of q, k, v; a function of its own because functorch's grad differentiates what a backward calls."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, output, lse, grad_output, grad_lse, call = arguments
        return attention_backward_op([q, k, v, output, lse], grad_output, grad_lse, *call.plain)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(SECOND_DERIVATIVE)


class TangentBackward(AttentionFunction):
    """Gradients of q, k, v, tq, tk, tv from cotangents of output, lse and tangent."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor | None, ...]:
        q, k, v, tq, tk, tv, output, lse, tangent, mean, grad_output, grad_lse, grad_tangent, call = arguments
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        grads = attention_tangent_backward_op(
            [q, k, v, output, lse, tangent, mean], [tq, tk, tv], [grad_output, grad_tangent, grad_lse], *call.plain
        )
        absent = [None if tangent is None else grad for tangent, grad in zip((tq, tk, tv), grads[3:], strict=True)]
        return *grads[:3], *absent

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(SECOND_DERIVATIVE)


def gradients(
    saved: Any, grad_output: Tensor | None, grad_lse: Tensor | None, call: Call
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v from what the forward pass saved: q, k, v, output, lse."""
    if grad_output is None and grad_lse is None:
        return None, None, None
    if grad_output is None:
        grad_output = torch.zeros_like(saved[3])
    return Backward.apply(*saved, grad_output, grad_lse, call)


def without_graph(result: Tensor) -> Tensor:
    """The result of a `Function`; under no_grad without the graph, which `torch.func` records there all the same."""
    return result if torch.is_grad_enabled() else result.detach()


@torch.compiler.assume_constant_result
def forward_levels() -> int:
    """How many `torch.func.jvp` are open around the code that torch.compile traces."""
    return eager_transforms.JVP_NESTING


def refuse_nesting() -> None:
    """Raise NotImplementedError inside two `torch.func.jvp` while torch.compile traces.

    Operators drop the tangent of the outer one without a word; in eager mode a `Function` without a `jvp` refuses it.
    """
    if forward_levels() > 1:
        raise NotImplementedError(NESTED_FORWARD_MODE)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """(output, lse) with the gradient of both."""
    if torch.compiler.is_compiling():
        refuse_nesting()
        return attention_traced_op(q, k, v, *call.plain)
    output, lse = Attention.apply(q, k, v, call)
    return without_graph(output), without_graph(lse)


def forward_jvp(
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    call: Call,
    *,
    tangent_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, lse, tangent, mean) with the gradient of output and lse, and that of the tangent on request.

    Raises:
        ValueError: the gradient of the tangent is asked for while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        if tangent_grad:
            raise ValueError(
                "The gradient through the tangent of attention cannot be compiled. Leave the function that needs it "
                "out of torch.compile (torch.compiler.disable), or use tangent_grad=False and detach the tangent."
            )
        refuse_nesting()
        return attention_jvp_traced_op(list(primals), *tangents, *call.plain)
    function = AttentionJvpWithGrad if tangent_grad else AttentionJvp
    output, lse, tangent, mean = function.apply(*primals, *tangents, call)
    return without_graph(output), without_graph(lse), without_graph(tangent), without_graph(mean)


def setup_traced(ctx: Any, inputs: Any, output: Any) -> None:
    """What the twin of the forward operator keeps."""
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.plain = inputs[3:]


def backward_traced(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> Any:
    """Gradients of the twin of the forward operator; torch hands zeros for outputs that were not used."""
    grads = attention_backward_op(list(ctx.saved_tensors), grad_output, grad_lse, *ctx.plain)
    return *grads, None, None, None


def setup_jvp_traced(ctx: Any, inputs: Any, output: Any) -> None:
    """What the twin of the forward operator with tangents keeps."""
    ctx.save_for_backward(*inputs[0], *output[:2])
    ctx.plain = inputs[4:]
    ctx.set_materialize_grads(False)


def backward_jvp_traced(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, *grads: Tensor | None) -> Any:
    """Gradients of the twin with tangents: those of output and lse alone.

    Without a detach in the traced function, torch hands the gradients of tangents even where they are zero, so whether
    one arrives is only known from its values.
    """
    saved = list(ctx.saved_tensors)
    if grad_output is None:
        grad_output = torch.zeros_like(saved[3])
    arriving = [grad for grad in grads if grad is not None]
    if arriving:
        primal_grads = attention_backward_checked_op(saved, grad_output, grad_lse, arriving, *ctx.plain)
    else:
        primal_grads = attention_backward_op(saved, grad_output, grad_lse, *ctx.plain)
    return list(primal_grads), None, None, None, None, None, None


attention_traced_op.register_autograd(backward_traced, setup_context=setup_traced)
attention_jvp_traced_op.register_autograd(backward_jvp_traced, setup_context=setup_jvp_traced)
