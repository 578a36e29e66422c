"""Calls of attention for tests: masks of every kind, inputs with an own width for each role, and errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fewstep.kernels import attention_tiles
from fewstep.kernels import mask as masks
from fewstep.kernels.attention_reference import AttentionResult, attention_jvp_reference
from fewstep.kernels.attention_tiled import tiled_forward_jvp
from fewstep.kernels.attention_tiled_backward import Saved, SavedTangents, tiled_backward, tiled_tangent_backward
from fewstep.kernels.mask import AttentionMask

BATCH = 2
SCALE = 0.4
Triple = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Inputs:
    """Primals q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, E] and tangents that keep the promises of the mask."""

    primals: Triple
    tangents: Triple
    mask: AttentionMask

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, rounded."""
        return Inputs(triple(x.to(dtype) for x in self.primals), triple(x.to(dtype) for x in self.tangents), self.mask)

    def leaves(self) -> tuple[Triple, Triple]:
        """Copies of primals and tangents that collect gradients."""
        return leaves(self.primals), leaves(self.tangents)


def triple(parts: Iterator[Tensor]) -> Triple:
    """Three tensors, with a type that says so."""
    q, k, v = parts
    return q, k, v


def leaves(parts: Triple) -> Triple:
    """Copies that collect gradients."""
    return triple(x.detach().clone().requires_grad_() for x in parts)


def draw(
    mask: AttentionMask,
    *,
    seed: int = 0,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (6, 5),
    batch: int = BATCH,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Normal inputs for a mask; tangents are zero where the mask promises it."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(count: int, tokens: int, width: int, active: Tensor | None) -> Tensor:
        x = torch.randn(batch, count, tokens, width, dtype=torch.float64, generator=generator)
        return (x if active is None else x * active[:, None]).to(dtype)

    def side(query_active: Tensor | None, key_active: Tensor | None) -> Triple:
        q = tensor(heads[0], mask.queries, widths[0], query_active)
        return q, tensor(heads[1], mask.keys, widths[0], key_active), tensor(heads[1], mask.keys, widths[1], key_active)

    return Inputs(side(None, None), side(mask.query_active, mask.key_active), mask)


def holes() -> AttentionMask:
    """Rows that see nothing, a whole tile of them too, and keys that nobody sees."""
    return masks.from_predicate(lambda i, j: (i % 5 != 0) & (i < 40) & (j % 16 >= 4) & (j < i + 3), 61, 53)


def mixed() -> AttentionMask:
    """Full, partial and empty tiles and random activity, so that rows mix all classes of tiles."""
    mask = masks.from_predicate(lambda i, j: (i // 8 * 7 + j // 8 * 3 + i % 2) % 5 < 3, 71, 75, max_intervals=8)
    generator = torch.Generator().manual_seed(4)
    sides = [(torch.rand(10, generator=generator) < 0.5).repeat_interleave(8)[:count] for count in (71, 75)]
    return mask.with_activity(queries=sides[0], keys=sides[1])


def biased(mask: AttentionMask, rows: int = 1) -> AttentionMask:
    """Numbers of any sign on the keys, many of them on one, and some keys that nobody is to see."""
    bias = 2 * torch.randn(rows, mask.keys, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bias[:, ::7], bias[:, -1] = -1e4, 5.5
    return mask.with_key_bias(bias)


MASKS: dict[str, Callable[[], AttentionMask]] = {
    "full": lambda: masks.full(45, 51),
    "causal": lambda: masks.causal(67),
    "block_causal": lambda: masks.block_causal([5, 17, 1, 30, 9]),
    "window_sink": lambda: masks.block_causal([7] * 9, window=2, sink=1),
    "teacher_forcing": lambda: masks.teacher_forcing([9, 13, 6]),
    "teacher_forcing_constant": lambda: masks.teacher_forcing([9, 13, 6], clean_is_constant=True),
    "teacher_forcing_window": lambda: masks.teacher_forcing([6] * 6, window=2, sink=1, clean_is_constant=True),
    "documents": lambda: masks.documents([3, 0, 1, 40, 20]),
    "lengths": lambda: masks.lengths(torch.tensor([0, 33]), queries=20, keys=40),
    "holes": holes,
    "mixed": mixed,
    "text": lambda: masks.full(33, 18).with_activity(queries=None, keys=torch.zeros(18, dtype=torch.bool)),
    "one_token": lambda: masks.full(1),
    "no_queries": lambda: masks.full(0, 7),
    "no_keys": lambda: masks.full(7, 0),
    "biased": lambda: biased(masks.full(45, 51)),
    "biased_each": lambda: biased(masks.lengths(torch.tensor([20, 33]), queries=20, keys=40), rows=2),
    "biased_constant": lambda: biased(masks.teacher_forcing([9, 13, 6], clean_is_constant=True), rows=2),
    "biased_holes": lambda: biased(holes()),
}


@contextmanager
def small_tiles(queries: tuple[int, ...] = (32, 16), keys: int = 8, run: int = 16) -> Iterator[None]:
    """Tiles that make a hundred tokens many tiles. Masks that were walked over before keep their tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "QUERY_TILES", queries)
        patch.setattr(attention_tiles, "KEY_TILE", keys)
        patch.setattr(attention_tiles, "RUN_WIDTH", run)
        yield


def close(ours: Tensor | None, exact: Tensor | None, tolerance: float = 1e-12) -> None:
    """Equal shapes and, up to the tolerance, numbers; NaN is equal to nothing."""
    assert ours is not None
    assert exact is not None
    torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


def distance(ours: Tensor | None, exact: Tensor | None) -> float:
    """|ours - exact| / |exact| in float64."""
    assert ours is not None
    assert exact is not None
    exact = exact.detach().double()
    return float((ours.detach().double() - exact).norm() / exact.norm())


def tiled(inputs: Inputs, scale: float = SCALE) -> AttentionResult:
    output, lse, tangent, mean = tiled_forward_jvp(*inputs.primals, *inputs.tangents, mask=inputs.mask, scale=scale)
    return AttentionResult(output, lse, tangent, mean)


def exact(inputs: Inputs, scale: float = SCALE) -> AttentionResult:
    return attention_jvp_reference(*inputs.primals, *inputs.tangents, mask=inputs.mask, scale=scale)


def cotangents(result: AttentionResult, seed: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of output, tangent and lse."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (result.output.shape, result.output.shape, result.lse.shape)
    return triple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def plain_gradients(inputs: Inputs, result: AttentionResult, *, with_lse: bool) -> Gradients:
    grad_output, _, grad_lse = cotangents(result)
    saved = Saved(*inputs.primals, result.output, result.lse)
    arriving = grad_output.to(result.output.dtype)
    return tiled_backward(saved, arriving, grad_lse if with_lse else None, mask=inputs.mask, scale=SCALE)


def all_gradients(inputs: Inputs, result: AttentionResult, *, with_lse: bool) -> Gradients:
    grad_output, grad_tangent, grad_lse = (x.to(result.output.dtype) for x in cotangents(result))
    assert result.tangent is not None
    assert result.mean is not None
    saved = Saved(*inputs.primals, result.output, result.lse)
    known = SavedTangents(*inputs.tangents, result.tangent, result.mean)
    last = grad_lse if with_lse else None
    return tiled_tangent_backward(saved, known, grad_output, grad_tangent, last, mask=inputs.mask, scale=SCALE)
