"""The specification itself: against torch's attention, forward mode, autograd through it, and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep.kernels import mask as masks
from fewstep.kernels.attention_reference import (
    attention_jvp_backward_reference,
    attention_jvp_reference,
    attention_reference,
)
from fewstep.kernels.mask import AttentionMask
from fewstep.kernels.mask_conversion import dense
from tests.kernels.strategies import MaskCase, mask_cases

BATCH = 2
Triple = tuple[Tensor, Tensor, Tensor]


def draw(queries: int, keys: int, *, seed: int = 0, heads: tuple[int, int] = (4, 2)) -> Triple:
    """q [2, H, Nq, 5], k [2, G, Nk, 5], v [2, G, Nk, 3] in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((BATCH, heads[0], queries, 5), (BATCH, heads[1], keys, 5), (BATCH, heads[1], keys, 3))
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    return q, k, v


def close(a: Tensor | None, b: Tensor | None, tolerance: float = 1e-12) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def empty_rows(mask: AttentionMask) -> Tensor:
    """bool [2, 4, Nq]: queries that see no key."""
    return ~dense(mask).any(-1)[:, None].expand(BATCH, 4, -1)


@settings(max_examples=40, deadline=None)
@given(mask_cases(max_tokens=40, batch=BATCH), st.sampled_from([None, 0.3]))
def test_output_and_lse_equal_torch(case: MaskCase, scale: float | None) -> None:
    q, k, v = draw(case.mask.queries, case.mask.keys)
    result = attention_reference(q, k, v, mask=case.mask, scale=scale)
    seen = dense(case.mask)[:, None]
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    close(result.output, theirs.nan_to_num())
    scores = q @ k.repeat_interleave(2, 1).mT * (5**-0.5 if scale is None else scale)
    close(result.lse, scores.masked_fill(~seen, -math.inf).logsumexp(-1))
    assert result.tangent is None
    assert result.mean is None


@settings(max_examples=40, deadline=None)
@given(mask_cases(max_tokens=40, batch=BATCH), st.sampled_from([None, 0.3]), st.sampled_from([(4, 4), (4, 2), (4, 1)]))
def test_forward_mode_equals_the_formula(case: MaskCase, scale: float | None, heads: tuple[int, int]) -> None:
    mask = case.mask
    primals, tangents = (draw(mask.queries, mask.keys, seed=seed, heads=heads) for seed in (1, 2))

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = attention_reference(q, k, v, mask=mask, scale=scale)
        return result.output, result.lse

    (output, lse), (tangent, lse_tangent) = torch.func.jvp(both, primals, tangents)[:2]
    result = attention_jvp_reference(*primals, *tangents, mask=mask, scale=scale)
    close(result.output, output)
    close(result.lse, lse)
    close(result.tangent, tangent)
    close(result.mean, lse_tangent)


@settings(max_examples=30, deadline=None)
@given(mask_cases(max_tokens=30, batch=BATCH), st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.booleans())
def test_gradient_through_the_tangent(case: MaskCase, heads: tuple[int, int], with_lse: bool) -> None:
    mask = case.mask
    primals, tangents = (draw(mask.queries, mask.keys, seed=seed, heads=heads) for seed in (1, 2))
    leaves = [x.clone().requires_grad_() for x in (*primals, *tangents)]

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result = attention_reference(q, k, v, mask=mask, scale=0.4)
        return result.output, result.lse

    (output, lse), (tangent, _) = torch.func.jvp(both, tuple(leaves[:3]), tuple(leaves[3:]))[:2]
    grad_output, grad_tangent, grad_lse = torch.randn_like(output), torch.randn_like(output), torch.randn_like(lse)
    results = (output, tangent, lse) if with_lse else (output, tangent)
    expected = torch.autograd.grad(results, leaves, (grad_output, grad_tangent, grad_lse)[: len(results)])
    got = attention_jvp_backward_reference(
        primals, tangents, grad_output, grad_tangent, grad_lse if with_lse else None, mask=mask, scale=0.4
    )
    for ours, theirs in zip((got.dq, got.dk, got.dv, got.dtq, got.dtk, got.dtv), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_a_missing_tangent_is_zero(missing: tuple[int, ...]) -> None:
    mask = masks.teacher_forcing([3, 5])
    primals, tangents = draw(16, 16, seed=1), draw(16, 16, seed=2)
    zeroed = [torch.zeros_like(t) if i in missing else t for i, t in enumerate(tangents)]
    tq, tk, tv = (None if i in missing else t for i, t in enumerate(tangents))
    short, long = (attention_jvp_reference(*primals, *t, mask=mask) for t in ((tq, tk, tv), zeroed))
    close(short.tangent, long.tangent, 1e-15)
    close(short.mean, long.mean, 1e-15)
    grads = torch.randn(2, 2, 4, 16, 3, dtype=torch.float64)
    short_grads = attention_jvp_backward_reference(primals, (tq, tk, tv), *grads, mask=mask)
    long_grads = attention_jvp_backward_reference(primals, (zeroed[0], zeroed[1], zeroed[2]), *grads, mask=mask)
    close(short_grads.dq, long_grads.dq, 1e-15)
    close(short_grads.dtk, long_grads.dtk, 1e-15)
    if len(missing) == 3:
        assert short.tangent is not None
        assert short.mean is not None
        assert short.tangent.count_nonzero() == short.mean.count_nonzero() == 0


def test_mean_is_the_slope_of_lse() -> None:
    mask = masks.documents([4, 1, 7])
    (q, k, v), (tq, tk, tv) = draw(12, 12, seed=1), draw(12, 12, seed=2)
    step = 1e-5
    ahead = attention_reference(q + step * tq, k + step * tk, v, mask=mask).lse
    behind = attention_reference(q - step * tq, k - step * tk, v, mask=mask).lse
    close(attention_jvp_reference(q, k, v, tq, tk, tv, mask=mask).mean, (ahead - behind) / (2 * step), 1e-8)


def test_a_tangent_common_to_all_keys_moves_the_mean_alone() -> None:
    (q, k, v), (tq, tk, tv) = draw(9, 12, seed=1), draw(9, 12, seed=2)
    common = torch.randn(BATCH, 2, 1, 5, dtype=torch.float64)
    plain = attention_jvp_reference(q, k, v, tq, tk, tv)
    moved = attention_jvp_reference(q, k, v, tq, tk + common, tv)
    assert plain.mean is not None
    close(moved.tangent, plain.tangent)
    close(moved.mean, plain.mean + (q @ common.repeat_interleave(2, 1).mT).squeeze(-1) * 5**-0.5)


def test_one_key_in_closed_form() -> None:
    (q, k, v), (tq, tk, tv) = draw(3, 1, seed=1, heads=(2, 2)), draw(3, 1, seed=2, heads=(2, 2))
    result = attention_jvp_reference(q, k, v, tq, tk, tv, scale=2.0)
    close(result.output, v.expand(-1, -1, 3, -1))
    close(result.tangent, tv.expand(-1, -1, 3, -1))
    close(result.lse, 2 * (q * k).sum(-1))
    close(result.mean, 2 * (tq * k + q * tk).sum(-1))


def test_queries_that_see_nothing_give_zeros_and_finite_gradients() -> None:
    mask = AttentionMask(torch.tensor([[[[0, 0]], [[2, 5]], [[0, 0]]]], dtype=torch.int32), 6)
    primals, tangents = draw(3, 6, seed=1), draw(3, 6, seed=2)
    result = attention_jvp_reference(*primals, *tangents, mask=mask)
    assert result.tangent is not None
    assert result.mean is not None
    hidden = empty_rows(mask)
    assert result.lse[hidden].tolist() == [-math.inf] * 16
    for x in (result.output, result.tangent, result.mean):
        assert x[hidden].count_nonzero() == 0
        assert x[~hidden].isfinite().all()
    q, k, v = (x.clone().requires_grad_() for x in primals)
    plain = attention_reference(q, k, v, mask=mask)
    arriving = torch.randn_like(plain.output), torch.randn_like(plain.lse)
    dq, dk, dv = torch.autograd.grad((plain.output, plain.lse), (q, k, v), arriving)
    assert dq[hidden].count_nonzero() == 0
    for grad in (dk, dv):
        assert grad[:, :, [0, 1, 5]].count_nonzero() == 0
        assert grad.isfinite().all()
    assert dv[:, :, 2:5].count_nonzero() == BATCH * 2 * 3 * 3


def test_all_rows_empty_and_no_keys_at_all() -> None:
    primals, tangents = draw(3, 4), draw(3, 4, seed=1)
    hidden = attention_jvp_reference(*primals, *tangents, mask=masks.lengths(torch.zeros(2).long(), queries=3, keys=4))
    (q, k, v), (tq, tk, tv) = draw(3, 0), draw(3, 0, seed=1)
    absent = attention_jvp_reference(q, k, v, tq, tk, tv)
    for result in (hidden, absent):
        assert result.output.shape == (BATCH, 4, 3, 3)
        assert result.tangent is not None
        assert result.output.count_nonzero() == result.tangent.count_nonzero() == 0
        assert bool((result.lse == -math.inf).all())


def test_keys_that_nobody_sees_do_not_matter() -> None:
    mask = masks.lengths(torch.tensor([3, 6]), queries=5, keys=6)
    (q, k, v), (tq, tk, tv) = draw(5, 6, seed=1), draw(5, 6, seed=2)
    before = attention_jvp_reference(q, k, v, tq, tk, tv, mask=mask)
    for x in (k, v, tk, tv):
        x[0, :, 3:] = 1e6
    after = attention_jvp_reference(q, k, v, tq, tk, tv, mask=mask)
    close(after.output, before.output, 0)
    close(after.tangent, before.tangent, 0)


def test_large_scores_do_not_overflow() -> None:
    (q, k, v), (tq, tk, tv) = draw(5, 6, seed=1), draw(5, 6, seed=2)
    result = attention_jvp_reference(q * 1e3, k * 1e3, v, tq, tk, tv)
    assert result.tangent is not None
    assert result.lse.abs().max() > 1e5
    assert all(bool(x.isfinite().all()) for x in (result.output, result.lse, result.tangent))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 8e-3)])
def test_narrow_inputs_are_computed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    mask = masks.causal(40)
    inputs = [x.to(dtype) for x in (*draw(40, 40, seed=1), *draw(40, 40, seed=2))]
    exact = attention_jvp_reference(*(x.double() for x in inputs), mask=mask)
    result = attention_jvp_reference(*inputs, mask=mask)
    assert result.tangent is not None
    assert exact.tangent is not None
    assert (result.output.dtype, result.tangent.dtype, result.lse.dtype) == (dtype, dtype, torch.float32)
    for ours, theirs in ((result.output, exact.output), (result.tangent, exact.tangent), (result.lse, exact.lse)):
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


def test_shapes_are_checked() -> None:
    q, k, v = draw(5, 6)
    with pytest.raises(ValueError, match="mask is for 4 queries"):
        attention_reference(q, k, v, mask=masks.full(4, 6))
    with pytest.raises(ValueError, match="tangent of k has shape"):
        attention_jvp_reference(q, k, v, q, v, v)
    with pytest.raises(ValueError, match="multiple"):
        attention_reference(q[:, :3], k, v)
