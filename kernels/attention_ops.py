"""Attention kernels as torch operators, and the autograd that stands on them.

An operator of torch cannot be given a forward-mode formula, and one that is reached by a dual tensor returns a tangent
of zero without an error. So operators see plain tensors only: primals and tangents are arguments of equal standing, and
`fewstep.kernels.attention` takes dual tensors apart before and puts them together after. For the same reason the
autograd functions here have no `jvp`: one nested in another raises NotImplementedError instead of giving a wrong
number.

While torch.compile traces, the twins with `_traced` in their name stand in: AOT autograd differentiates the operator
itself, so that needs its own gradient. Masks are passed as their handle, which keeps operators a function of tensors
and numbers.

Legend: q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, E], output and tangent [B, H, Nq, E], lse and mean [B, H, Nq].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.kernels.attention_tiled import tiled_forward, tiled_forward_jvp
from fewstep.kernels.attention_tiled_backward import Saved, SavedTangents, tiled_backward, tiled_tangent_backward
from fewstep.kernels.mask import AttentionMask, mask_of, unmasked

NO_MASK = 0
TANGENT_GRADIENT = (
    "A gradient arrives at the tangent of attention, which is treated as a constant. Call .detach() on the tangent "
    "where it enters the loss (inside the compiled function if the loss is compiled), or ask for this gradient: "
    "attention(..., tangent_grad=True) or attention_jvp_with_grad(...)."
)


def resolve_mask(handle: int, q: Tensor, k: Tensor) -> AttentionMask:
    """The mask behind a handle, on the device of q."""
    if handle == NO_MASK:
        return unmasked(q.shape[2], k.shape[2], q.device)
    return mask_of(handle).to(q.device)


def check_promise(mask: AttentionMask, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None) -> None:
    """Raise ValueError where a tangent is not zero although the mask promises it."""
    sides = (("q", tq, mask.query_active), ("k", tk, mask.key_active), ("v", tv, mask.key_active))
    for name, tangent, active in sides:
        if tangent is None or active is None:
            continue
        largest = tangent[:, :, ~active].abs().amax().item() if not bool(active.all()) else 0.0
        if largest != 0:
            raise ValueError(
                f"The mask promises that the tangent of {name} is zero at {int((~active).sum())} tokens, but its "
                f"largest value there is {largest:.3g}. Give these tokens a constant time and no conditioning that has "
                "a tangent, or build the mask without the promise (clean_is_constant=False, or "
                "with_activity(queries=None, keys=None))."
            )


def run_forward(q: Tensor, k: Tensor, v: Tensor, mask: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    """(output, lse) by the kernels of one path, "tiled" or "triton"."""
    if path == "triton":
        from fewstep.kernels.attention_jvp_triton import attention_forward

        return attention_forward(q, k, v, mask=resolve_mask(mask, q, k), scale=scale)
    return tiled_forward(q, k, v, mask=resolve_mask(mask, q, k), scale=scale)


def run_forward_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    mask: int,
    scale: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, lse, tangent, mean) by the kernels of one path; at least one tangent is not None."""
    found = resolve_mask(mask, q, k)
    if found.verify:
        check_promise(found, *tangents)
    if path == "triton":
        from fewstep.kernels.attention_jvp_triton import attention_forward_jvp

        return attention_forward_jvp(q, k, v, *tangents, mask=found, scale=scale)
    return tiled_forward_jvp(q, k, v, *tangents, mask=found, scale=scale)


# The signatures of operators are spelled out: torch reads their schema from the annotations.


@torch.library.custom_op("fewstep::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, mask: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, mask, scale, path)


@torch.library.custom_op("fewstep::attention_traced", mutates_args=())
def attention_traced_op(q: Tensor, k: Tensor, v: Tensor, mask: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, mask, scale, path)


@torch.library.custom_op("fewstep::attention_jvp", mutates_args=())
def attention_jvp_op(
    primals: list[Tensor], tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = primals
    return run_forward_jvp(q, k, v, (tq, tk, tv), mask, scale, path)


@torch.library.custom_op("fewstep::attention_jvp_traced", mutates_args=())
def attention_jvp_traced_op(
    primals: list[Tensor], tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = primals
    return run_forward_jvp(q, k, v, (tq, tk, tv), mask, scale, path)


@torch.library.custom_op("fewstep::attention_backward", mutates_args=())
def attention_backward_op(
    saved: list[Tensor], grad_output: Tensor, grad_lse: Tensor | None, mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, output, lse = saved
    found = resolve_mask(mask, q, k)
    if path == "triton":
        from fewstep.kernels.attention_backward_triton import attention_backward

        return attention_backward(q, k, v, output, lse, grad_output, grad_lse, mask=found, scale=scale)
    return tiled_backward(Saved(q, k, v, output, lse), grad_output, grad_lse, mask=found, scale=scale)


@torch.library.custom_op("fewstep::attention_backward_checked", mutates_args=())
def attention_backward_checked_op(
    saved: list[Tensor],
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grads_of_tangents: list[Tensor],
    mask: int,
    scale: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward_op` that raises ValueError if a gradient of a tangent is not zero; waits for the device."""
    if any(bool(grad.any()) for grad in grads_of_tangents):
        raise ValueError(TANGENT_GRADIENT)
    return attention_backward_op(saved, grad_output, grad_lse, mask, scale, path)


def fake_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of (output, lse) for tracing."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=compute)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    return fake_forward(q, k, v)


@attention_traced_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: int, scale: float, path: str) -> tuple[Tensor, Tensor]:
    return fake_forward(q, k, v)


@attention_jvp_op.register_fake
def _(
    primals: list[Tensor], tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*fake_forward(*primals), *fake_forward(*primals))


@attention_jvp_traced_op.register_fake
def _(
    primals: list[Tensor], tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*fake_forward(*primals), *fake_forward(*primals))


@attention_backward_op.register_fake
def _(
    saved: list[Tensor], grad_output: Tensor, grad_lse: Tensor | None, mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = saved[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@attention_backward_checked_op.register_fake
def _(
    saved: list[Tensor],
    grad_output: Tensor,
    grad_lse: Tensor | None,
    grads_of_tangents: list[Tensor],
    mask: int,
    scale: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = saved[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("fewstep::attention_tangent_backward", mutates_args=())
def attention_tangent_backward_op(
    saved: list[Tensor], tangents: list[Tensor | None], grads: list[Tensor | None], mask: int, scale: float, path: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, tq, tk, tv; empty for a tangent that is None. Tiled on every device."""
    q, k, v, output, lse, tangent, mean = saved
    grad_output, grad_tangent, grad_lse = grads
    assert grad_output is not None
    assert grad_tangent is not None
    tq, tk, tv = tangents
    known = SavedTangents(tq, tk, tv, tangent, mean)
    found = resolve_mask(mask, q, k)
    result = tiled_tangent_backward(
        Saved(q, k, v, output, lse), known, grad_output, grad_tangent, grad_lse, mask=found, scale=scale
    )
    dq, dk, dv, dtq, dtk, dtv = (q.new_empty(0) if grad is None else grad for grad in result)
    return dq, dk, dv, dtq, dtk, dtv
