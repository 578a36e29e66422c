"""A loss on samples whose decoder and scorers hold the graph of a few samples at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def through_chunks(loss_of: Callable[[Tensor, slice], Tensor], x0: Tensor, *, chunk: int | None) -> Tensor:
    """The sum of `loss_of` over parts of the samples, whose gradient with respect to x0 is taken part by part.

    A decoder keeps gigabytes for each picture; only those of one part are there at once. Value and gradient are those
    of the whole, since each sample is scored by itself. Through x0 the gradient goes on as usual.

    Args:
        loss_of: the sum of the losses of some samples [n, ...] with their graph; the slice says which they are.
        x0: [B, ...] with graph.
        chunk: samples of a part; None is all.
    """
    leaf = x0.detach().requires_grad_()
    total, gradient = x0.new_zeros(()), torch.zeros_like(leaf)
    for start in range(0, len(leaf), chunk or len(leaf)):
        rows = slice(start, min(start + (chunk or len(leaf)), len(leaf)))
        loss = loss_of(leaf[rows], rows)
        (part,) = torch.autograd.grad(loss, leaf)
        total, gradient = total + loss.detach(), gradient + part
    # An exact zero that carries the gradient.
    return total + ((x0 - x0.detach()) * gradient).sum()
