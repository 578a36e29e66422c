"""Rounding errors of the tiled kernels, memory that nobody wrote, empty rows, NaN and large scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fewstep.kernels import mask as masks
from fewstep.kernels.attention_reference import attention_jvp_backward_reference
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_conversion import dense
from tests.kernels.attention_cases import (
    BATCH,
    MASKS,
    SCALE,
    Inputs,
    all_gradients,
    cotangents,
    distance,
    draw,
    exact,
    leaves,
    plain_gradients,
    small_tiles,
    tiled,
)


def rounded_attention(mask: AttentionMask) -> Callable[..., Tensor]:
    """Attention in the dtype of its inputs, by plain operations of torch."""
    hidden = ~dense(mask)[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).masked_fill(hidden, -math.inf).softmax(-1) @ v

    return attend


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "window_sink", "teacher_forcing_constant", "documents", "mixed"])
def test_errors_are_at_most_twice_those_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    inputs = draw(MASKS[name](), heads=(2, 2), widths=(32, 32)).to(dtype)
    truth = inputs.to(torch.float64)
    with small_tiles():
        ours = tiled(inputs)
        grads = plain_gradients(inputs, ours, with_lse=False)
        through = all_gradients(inputs, ours, with_lse=False)
    attend = rounded_attention(inputs.mask)
    with torch.no_grad():
        theirs = torch.func.jvp(attend, inputs.primals, inputs.tangents)
    right = exact(truth)
    pairs = [(ours.output, theirs[0], right.output), (ours.tangent, theirs[1], right.tangent)]
    grad_output, grad_tangent, _ = (x.to(dtype) for x in cotangents(ours))
    points = leaves(inputs.primals)
    plain = torch.autograd.grad(attend(*points), points, grad_output)
    zero = torch.zeros_like(grad_tangent).double()
    wanted = attention_jvp_backward_reference(
        truth.primals, truth.tangents, grad_output.double(), zero, mask=inputs.mask, scale=SCALE
    )
    pairs += list(zip(grads, plain, (wanted.dq, wanted.dk, wanted.dv), strict=True))
    starts = (*points, *leaves(inputs.tangents))
    output, tangent = torch.func.jvp(attend, starts[:3], starts[3:])[:2]
    plain = torch.autograd.grad((output, tangent), starts, (grad_output, grad_tangent))
    wanted = attention_jvp_backward_reference(
        truth.primals, truth.tangents, grad_output.double(), grad_tangent.double(), mask=inputs.mask, scale=SCALE
    )
    names = (wanted.dq, wanted.dk, wanted.dv, wanted.dtq, wanted.dtk, wanted.dtv)
    pairs += list(zip(through, plain, names, strict=True))
    assert len(pairs) == 11
    for place, (mine, rounded, value) in enumerate(pairs):
        assert distance(mine, value) <= 2 * distance(rounded, value), place


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that torch.empty hands out holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("poison")
def test_nothing_unwritten_is_returned(name: str, dtype: torch.dtype) -> None:
    inputs = draw(MASKS[name]()).to(dtype)
    with small_tiles():
        result = tiled(inputs)
        grads = (*plain_gradients(inputs, result, with_lse=True), *all_gradients(inputs, result, with_lse=True))
    assert result.tangent is not None
    assert result.mean is not None
    found = (result.output, result.tangent, result.mean, *(x for x in grads if x is not None))
    assert len(found) == 12
    assert sum(int(x.isnan().sum()) for x in (*found, result.lse)) == 0


def published_form(inputs: Inputs, scale: float, tile: int = 64) -> Tensor:
    """Tangent by the sums of arXiv:2410.11081, Appendix F, with weights in the dtype of the values and sums in fp32."""
    q, k, v, tq, tk, tv = (x.float() for x in (*inputs.primals, *inputs.tangents))
    dtype = inputs.primals[2].dtype
    m, total, r = torch.full_like(q[..., :1], -math.inf), torch.zeros_like(q[..., :1]), torch.zeros_like(q[..., :1])
    o = a = torch.zeros_like(v[:, :, :1].expand(-1, -1, q.shape[2], -1))
    for start in range(0, k.shape[2], tile):
        part = slice(start, start + tile)
        s, ts = q @ k[:, :, part].mT * scale, (tq @ k[:, :, part].mT + q @ tk[:, :, part].mT) * scale
        new = m.maximum(s.amax(-1, keepdim=True))
        p, decay = (s - new).exp(), (m - new).exp()
        h = p * ts
        total, r, m = total * decay + p.sum(-1, keepdim=True), r * decay + h.sum(-1, keepdim=True), new
        p, h = p.to(dtype).float(), h.to(dtype).float()
        o, a = o * decay + p @ v[:, :, part], a * decay + p @ tv[:, :, part] + h @ v[:, :, part]
    return (a / total - r / total * (o / total)).to(dtype)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_large_common_tangent_of_keys_costs_no_digits(size: float) -> None:
    inputs = draw(masks.full(256), heads=(2, 2), widths=(64, 64))
    tq, tk, tv = inputs.tangents
    common = size * torch.randn(BATCH, 2, 1, 64, dtype=torch.float64)
    narrow = Inputs(inputs.primals, (tq, tk + common, tv), inputs.mask).to(torch.bfloat16)
    truth = exact(narrow.to(torch.float64), 0.125)
    with small_tiles():
        assert distance(tiled(narrow, 0.125).tangent, truth.tangent) < 5e-3
    assert (distance(published_form(narrow, 0.125), truth.tangent) > 5e-3) == (size == 100.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [3.0, 60.0])
def test_peaky_softmax_and_scores_of_ten_thousand(factor: float, dtype: torch.dtype) -> None:
    inputs = draw(MASKS["block_causal"](), widths=(16, 8))
    q, k, v = inputs.primals
    narrow = Inputs((q * factor, k * factor, v), inputs.tangents, inputs.mask).to(dtype)
    truth = exact(narrow.to(torch.float64))
    largest = float(truth.lse.max())
    assert largest > (10 if factor == 3.0 else 1e4 * SCALE)
    with small_tiles():
        ours = tiled(narrow)
    bound = {torch.float32: 3e-5, torch.bfloat16: 8e-3}[dtype]
    assert distance(ours.output, truth.output) < bound
    assert distance(ours.lse, truth.lse) < 1e-6
    assert distance(ours.tangent, truth.tangent) < bound
    assert distance(ours.mean, truth.mean) < 1e-4


def test_queries_that_see_nothing() -> None:
    inputs = draw(MASKS["holes"]())
    blind = ~dense(inputs.mask)[0].any(-1)
    unseen = ~dense(inputs.mask)[0].any(-2)
    assert (int(blind.sum()), int(unseen.sum())) == (30, 23)
    with small_tiles():
        result = tiled(inputs)
        dq, dk, dv = plain_gradients(inputs, result, with_lse=True)
        all_six = all_gradients(inputs, result, with_lse=True)
    for x in (result.output, result.tangent, result.mean, dq, all_six[0], all_six[3]):
        assert x is not None
        assert x[:, :, blind].count_nonzero() == 0
        assert int(x.isnan().sum()) == 0
    for x in (dk, dv, all_six[1], all_six[2], all_six[4], all_six[5]):
        assert x is not None
        assert x[:, :, unseen].count_nonzero() == 0
        assert int(x.isnan().sum()) == 0
    assert result.lse[:, :, blind].eq(-math.inf).all()
    assert result.lse[:, :, ~blind].isfinite().all()


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_is_not_swallowed(place: int) -> None:
    inputs = draw(MASKS["causal"]())
    inputs.primals[place][:, :, 20] = math.nan
    with small_tiles():
        result = tiled(inputs)
    rows = torch.arange(67)
    touched = rows == 20 if place == 0 else rows >= 20
    assert result.output[:, :, touched].isnan().all()
    assert result.tangent is not None
    assert result.tangent[:, :, touched].isnan().all()
    if place < 2:
        assert result.lse[:, :, touched].isnan().all()
        assert result.lse[:, :, ~touched].isfinite().all()
    if place == 0:
        assert result.output[:, :, ~touched].isfinite().all()


def test_nan_in_a_tangent_is_not_swallowed() -> None:
    for place in range(3):
        inputs = draw(MASKS["causal"]())
        inputs.tangents[place][:, :, 20] = math.nan
        with small_tiles():
            result = tiled(inputs)
        assert result.tangent is not None
        assert result.tangent[:, :, 20].isnan().all()
        assert result.output.isfinite().all()
