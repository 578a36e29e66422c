"""Attention, its tangent and the gradient through both, in plain torch: the specification of the other kernels.

It keeps matrices of Nq x Nk, so it is for tests and for short sequences. Computed in fp32, in fp64 for fp64 inputs.

With scores S = scale q k^T on the keys that are seen, weights P = softmax(S) and output o = P v, the tangent is

    tS = scale (tq k^T + q tk^T),    mean = sum_j P tS,    to = P tv + (P o (tS - mean)) v

where `mean` is also the tangent of the log-sum-exp (arXiv:2410.11081, Appendix F). A query that sees no key has output,
tangent, mean and gradients 0, and log-sum-exp -inf.

Legend: B batch; H query heads; G key heads, a divisor of H (query head h reads key head h // (H // G)); Nq queries, Nk
keys; D width of queries and keys, E width of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.kernels.attention_checks import check_inputs, check_tangents
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_conversion import dense

Primals = tuple[Tensor, Tensor, Tensor]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class AttentionResult:
    """What attention returns.

    Attributes:
        output: [B, H, Nq, E] in the dtype of q.
        lse: natural log-sum-exp of the scores, [B, H, Nq], fp32 (fp64 for fp64 inputs); -inf for an empty row.
        tangent: of the output, [B, H, Nq, E] in the dtype of q; None where none was asked for.
        mean: tangent of lse, the mean of the score tangents under the weights, [B, H, Nq] like lse; or None.
    """

    output: Tensor
    lse: Tensor
    tangent: Tensor | None = None
    mean: Tensor | None = None


@dataclass(frozen=True)
class AttentionGradients:
    """Gradients with respect to q, k, v and their tangents, each in the shape and dtype of what it belongs to."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dtq: Tensor
    dtk: Tensor
    dtv: Tensor


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, mask: AttentionMask | None = None, scale: float | None = None
) -> AttentionResult:
    """softmax(scale q k^T) v over the keys that the mask shows; autograd and forward mode go through it.

    Args:
        q: [B, H, Nq, D].
        k: [B, G, Nk, D].
        v: [B, G, Nk, E].
        mask: which keys each query sees; None is all of them.
        scale: factor of the scores; 1 / sqrt(D) if None.

    Returns:
        Output and lse; tangents of dual inputs are those of the two.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_inputs(q, k, v, mask)
    wide_q, wide_k = widen(q), per_query_head(k, q)
    weights, lse = softmax(biased(wide_q @ wide_k.mT * scale_of(q, scale), mask), visible(mask, q, k))
    return AttentionResult((weights @ per_query_head(v, q)).to(q.dtype), lse)


def attention_jvp_reference(
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
    """Attention and its tangent by the formula above; a tangent that is None is zero.

    Args:
        q: as in `attention_reference`, likewise k, v, mask and scale.
        tq: tangent of q in its shape and dtype, likewise tk and tv.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_inputs(q, k, v, mask)
    check_tangents((q, k, v), (tq, tk, tv))
    weights, lse, centred, mean = linearize((q, k, v), (tq, tk, tv), mask, scale_of(q, scale))
    wide_v = per_query_head(v, q)
    tangent = (weights * centred) @ wide_v
    if tv is not None:
        tangent = tangent + weights @ per_query_head(tv, q)
    return AttentionResult((weights @ wide_v).to(q.dtype), lse, tangent.to(q.dtype), mean)


def attention_jvp_backward_reference(
    primals: Primals,
    tangents: Tangents,
    grad_output: Tensor,
    grad_tangent: Tensor,
    grad_lse: Tensor | None = None,
    *,
    mask: AttentionMask | None = None,
    scale: float | None = None,
) -> AttentionGradients:
    """Gradients through output, tangent and lse by closed forms, with g_o, g_to, g_lse the gradients that arrive:

        Y = g_to v^T,   X = g_o v^T + g_to tv^T,   C = tS - mean
        eta = g_to . o,   Delta = g_o . o + g_to . to - g_lse
        d_tS = P o (Y - eta),           d_S = P o (X - Delta + (Y - eta) o C)
        dq = scale (d_S k + d_tS tk),   dk = scale (d_S^T q + d_tS^T tq),   dv = P^T g_o + (P o C)^T g_to
        dtq = scale d_tS k,             dtk = scale d_tS^T q,               dtv = P^T g_to

    Args:
        primals: q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, E].
        tangents: of the three; None is zero.
        grad_output: [B, H, Nq, E].
        grad_tangent: [B, H, Nq, E].
        grad_lse: [B, H, Nq]; None is zero. Not used for queries that see no key.
        mask: as in `attention_reference`, likewise scale.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_inputs(*primals, mask)
    check_tangents(primals, tangents)
    q, k, v = primals
    factor = scale_of(q, scale)
    weights, _, centred, _ = linearize(primals, tangents, mask, factor)
    wide_q, wide_k, wide_v = widen(q), per_query_head(k, q), per_query_head(v, q)
    tq, tk, tv = (torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True))
    wide_tk, wide_tv, g_o, g_to = per_query_head(tk, q), per_query_head(tv, q), widen(grad_output), widen(grad_tangent)

    output = weights @ wide_v
    tangent = weights @ wide_tv + (weights * centred) @ wide_v
    delta = (g_o * output + g_to * tangent).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    y = g_to @ wide_v.mT - (g_to * output).sum(-1, keepdim=True)
    x = g_o @ wide_v.mT + g_to @ wide_tv.mT - delta.unsqueeze(-1)
    d_ts, d_s = weights * y * factor, weights * (x + y * centred) * factor
    return AttentionGradients(
        dq=(d_s @ wide_k + d_ts @ wide_tk).to(q.dtype),
        dk=sum_heads(d_s.mT @ wide_q + d_ts.mT @ widen(tq), k),
        dv=sum_heads(weights.mT @ g_o + (weights * centred).mT @ g_to, v),
        dtq=(d_ts @ wide_k).to(q.dtype),
        dtk=sum_heads(d_ts.mT @ wide_q, k),
        dtv=sum_heads(weights.mT @ g_to, v),
    )


def linearize(
    primals: Primals, tangents: Tangents, mask: AttentionMask | None, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(P, lse, tS - mean, mean): weights, and the score tangents centred on their mean in each row."""
    q, k, _ = primals
    tq, tk, _ = tangents
    wide_q, wide_k = widen(q), per_query_head(k, q)
    scores = wide_q @ wide_k.mT * factor
    weights, lse = softmax(biased(scores, mask), visible(mask, q, k))
    score_tangents = torch.zeros_like(scores)
    if tq is not None:
        score_tangents = score_tangents + widen(tq) @ wide_k.mT * factor
    if tk is not None:
        score_tangents = score_tangents + wide_q @ per_query_head(tk, q).mT * factor
    mean = (weights * score_tangents).sum(-1)
    return weights, lse, score_tangents - mean.unsqueeze(-1), mean


def biased(scores: Tensor, mask: AttentionMask | None) -> Tensor:
    """Scores [B, H, Nq, Nk] with the key bias of the mask, if it has one."""
    if mask is None or mask.key_bias is None:
        return scores
    return scores + mask.key_bias.to(scores)[:, None, None]


def softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [..., Nq, Nk], lse [..., Nq]) over the keys that are seen; `seen` is bool and broadcasts to the scores.

    Empty rows give 0 and -inf, and finite gradients.
    """
    scores = scores.masked_fill(~seen, float("-inf"))
    # An empty row has no maximum; any finite shift keeps -inf - shift from being NaN.
    shift = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    shift = shift.detach().masked_fill(shift == float("-inf"), 0.0)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (shift + total.log()).masked_fill(empty, float("-inf"))
    return weights / total, lse.squeeze(-1)


def visible(mask: AttentionMask | None, q: Tensor, k: Tensor) -> Tensor:
    """bool [1 or B, 1, Nq, Nk], True where a query sees a key."""
    if mask is None:
        return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return dense(mask.to(q.device)).unsqueeze(1)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale that was given, or 1 / sqrt(D)."""
    return scale if scale is not None else max(1, q.shape[-1]) ** -0.5


def widen(x: Tensor) -> Tensor:
    """fp64 stays, anything narrower becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """[B, G, N, D] to [B, H, N, D], each key head repeated for the query heads that read it; widened."""
    return widen(x).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def sum_heads(x: Tensor, like: Tensor) -> Tensor:
    """The transpose of `per_query_head`: [B, H, N, D] summed to the shape [B, G, N, D] and the dtype of `like`."""
    return x.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
