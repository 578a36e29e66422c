"""Attention with masks, gradients and tangents, in memory that grows with the number of tokens and not with its square.

`attention` is a drop-in for `torch.nn.functional.scaled_dot_product_attention` that also works under forward-mode
differentiation (`torch.func.jvp`, `torch.autograd.forward_ad`). `attention_jvp` is the pair below it, for code that
carries tangents by hand.

Legend: B batch; H query heads; G key heads, a divisor of H (query head h reads key head h // (H // G)); Nq queries, Nk
keys; D width of queries and keys, E width of values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep.kernels.attention_autograd import Call, forward, forward_jvp, forward_levels
from fewstep.kernels.attention_checks import check_inputs, check_tangents
from fewstep.kernels.attention_dispatch import choose_path, library_attention
from fewstep.kernels.attention_reference import AttentionResult
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_intervals import is_wrapped

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    tangent_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale q k^T) v over the keys that the mask lets each query see.

    A query that sees no key gets 0. Dual inputs give a dual output: its tangent is that of arXiv:2410.11081, Appendix
    F, and, like every tangent here, a constant for the gradient unless `tangent_grad` is set. Calls without a tangent
    go to torch's fused attention where the mask allows. Under torch.autocast all inputs are cast, as for that one.

    Args:
        q: [B, H, Nq, D], any strides. fp32, fp16, bf16, or fp64.
        k: [B, G, Nk, D], the dtype of q.
        v: [B, G, Nk, E], the dtype of q.
        mask: which keys each query sees (`fewstep.kernels.mask`); None is all of them.
        scale: factor of the scores; 1 / sqrt(D) if None.
        tangent_grad: let gradients flow through the tangent, to primals and to tangents (costs three backward passes).
        backend: "auto", or one of "sdpa", "flash", "xformers" (without tangents, full or causal masks), "triton",
        "tiled".

    Returns:
        [B, H, Nq, E] in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, the mask is of other lengths, or the backend cannot
            do what is asked.
    """
    primals, tangents, call = prepare(q, k, v, mask=mask, scale=scale)
    if all(tangent is None for tangent in tangents):
        # Below an open jvp a wrapped tensor is dual further down, where other libraries have no derivative: our own
        # functions say so in words.
        is_nested = not torch.compiler.is_compiling() and forward_levels() > 0 and any(map(is_wrapped, primals))
        fused = None if is_nested else library_attention(primals, call.mask, call.scale, backend)
        return fused if fused is not None else forward(*primals, call.on(choose_path(q, v, backend)))[0]
    call = call.on(choose_path(q, v, backend))
    output, _, tangent, _ = forward_jvp(primals, tangents, call, tangent_grad=tangent_grad)
    return forward_ad.make_dual(output, tangent)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    tangent_grad: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`attention` and the natural log-sum-exp of its scores, [B, H, Nq] in fp32 (fp64 for fp64 inputs), both dual.

    The log-sum-exp is -inf for a query that sees no key. With it, attention over parts of the keys can be merged:
    weights exp(lse_part - lse). Backends of other libraries do not return it and are refused.
    """
    primals, tangents, call = prepare(q, k, v, mask=mask, scale=scale)
    call = call.on(choose_path(q, v, backend))
    if all(tangent is None for tangent in tangents):
        return forward(*primals, call)
    output, lse, tangent, mean = forward_jvp(primals, tangents, call, tangent_grad=tangent_grad)
    return forward_ad.make_dual(output, tangent), forward_ad.make_dual(lse, mean)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
) -> AttentionResult:
    """Output and tangent from primals and tangents given side by side, for code that carries tangents by hand.

    Args:
        q: as in `attention`, without a forward-mode tangent of its own; likewise k and v.
        tq: tangent of q, same shape and dtype; None is zero and costs nothing. Likewise tk and tv.
        mask: as in `attention`.
        scale: as in `attention`.

    Returns:
        output [B, H, Nq, E], lse [B, H, Nq], tangent of the output, and mean [B, H, Nq], the tangent of lse. Gradients
        flow to output and lse; one that arrives at the tangent raises (see `attention_jvp_with_grad`).

    Raises:
        ValueError: as `attention`, or a tangent has another shape, dtype or device than its primal, or an argument
            carries a forward-mode tangent.
    """
    return explicit_pair((q, k, v), (tq, tk, tv), mask, scale, tangent_grad=False)


def attention_jvp_with_grad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
) -> AttentionResult:
    """`attention_jvp` whose tangent has a gradient, with respect to primals and tangents.

    The gradient keeps the tangents and takes fifteen matrix products where that of the output alone takes five. It is
    computed by the tiled path on every device.
    """
    return explicit_pair((q, k, v), (tq, tk, tv), mask, scale, tangent_grad=True)


def explicit_pair(
    primals: Primals, tangents: Tangents, mask: AttentionMask | None, scale: float | None, *, tangent_grad: bool
) -> AttentionResult:
    """The pair of `attention_jvp`; without any tangent, zeros."""
    q, k, v = (under_autocast(x) for x in primals)
    tq, tk, tv = (None if x is None else under_autocast(x) for x in tangents)
    primals, tangents = (q, k, v), (tq, tk, tv)
    check_inputs(q, k, v, mask)
    check_tangents(primals, tangents)
    refuse_dual((*primals, *tangents))
    call = Call(mask, default_scale(q) if scale is None else float(scale), choose_path(q, v, "auto"))
    if all(tangent is None for tangent in tangents):
        output, lse = forward(q, k, v, call)
        return AttentionResult(output, lse, torch.zeros_like(output), torch.zeros_like(lse))
    output, lse, tangent, mean = forward_jvp(primals, tangents, call, tangent_grad=tangent_grad)
    return AttentionResult(output, lse, tangent, mean)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask | None, scale: float | None
) -> tuple[Primals, Tangents, Call]:
    """Primals and tangents of three tensors that may be dual, checked; the call's path is not chosen yet."""
    try:
        pairs = [forward_ad.unpack_dual(under_autocast(x)) for x in (q, k, v)]
    except RuntimeError as error:
        if "_unpack_dual" not in str(error):
            raise
        raise NotImplementedError(
            "attention inside of torch.func.vmap inside of forward mode: torch cannot take such tensors apart. Put the "
            "jvp inside of the vmap (vmap of jvp, as jacfwd does), or the batches of the vmap into the batch."
        ) from error
    primals = (pairs[0].primal, pairs[1].primal, pairs[2].primal)
    tangents = (known_tangent(pairs[0].tangent), known_tangent(pairs[1].tangent), known_tangent(pairs[2].tangent))
    check_inputs(*primals, mask)
    check_tangents(primals, tangents)
    return primals, tangents, Call(mask, default_scale(q) if scale is None else float(scale), "tiled")


def under_autocast(x: Tensor) -> Tensor:
    """x in the dtype of an enclosing torch.autocast, as torch's own attention takes it; fp64 stays."""
    device = x.device.type
    # Asking torch whether a device has autocast ("meta" has none) breaks the graph of torch.compile before 2.13.
    may_cast = device in AUTOCAST_DEVICES and x.is_floating_point() and x.dtype != torch.float64
    if may_cast and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def refuse_dual(tensors: tuple[Tensor | None, ...]) -> None:
    """Raise ValueError for a tensor with a forward-mode tangent, which the explicit pair would drop."""
    for name, x in zip(("q", "k", "v", "tq", "tk", "tv"), tensors, strict=True):
        if x is not None and known_tangent(forward_ad.unpack_dual(x).tangent) is not None:
            raise ValueError(
                f"{name} carries a forward-mode tangent of its own, and tangents are arguments here. Call "
                "attention(q, k, v), which reads them from its inputs, or pass primal and tangent apart "
                "(forward_ad.unpack_dual)."
            )


def known_tangent(tangent: Tensor | None) -> Tensor | None:
    """None for a tangent that torch knows to be zero without storing it."""
    if tangent is None or torch.compiler.is_compiling():
        return tangent  # Dynamo cannot ask; a traced graph stores zeros where it has none.
    return None if tangent._is_zerotensor() else tangent


def default_scale(q: Tensor) -> float:
    """1 / sqrt(D), in the very bits of torch's own."""
    return 1 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
