"""The tiled kernels alone, in float64: every mask, layout, width, tile size and set of tangents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.kernels import attention_tiles
from fewstep.kernels import mask as masks
from fewstep.kernels.attention_reference import (
    AttentionResult,
    attention_jvp_backward_reference,
    attention_reference,
)
from fewstep.kernels.attention_tiled import tiled_forward, tiled_forward_jvp
from fewstep.kernels.attention_tiled_backward import Saved, SavedTangents, tiled_tangent_backward
from tests.kernels.attention_cases import (
    BATCH,
    MASKS,
    SCALE,
    Inputs,
    all_gradients,
    close,
    cotangents,
    draw,
    exact,
    plain_gradients,
    small_tiles,
    tiled,
    triple,
)
from tests.kernels.strategies import MaskCase, mask_cases


def same(ours: AttentionResult, theirs: AttentionResult, tolerance: float = 1e-12) -> None:
    close(ours.output, theirs.output, tolerance)
    close(ours.lse, theirs.lse, tolerance)
    close(ours.tangent, theirs.tangent, tolerance)
    close(ours.mean, theirs.mean, tolerance)


def check_everything(inputs: Inputs, *, with_lse: bool) -> None:
    """Output, lse, tangent, mean, three gradients of the primal, six through the tangent."""
    ours = tiled(inputs)
    same(ours, exact(inputs))
    grad_output, grad_tangent, grad_lse = cotangents(ours)
    last = grad_lse if with_lse else None
    zero = torch.zeros_like(grad_tangent)
    for got, through in ((plain_gradients, zero), (all_gradients, grad_tangent)):
        wanted = attention_jvp_backward_reference(
            inputs.primals, inputs.tangents, grad_output, through, last, mask=inputs.mask, scale=SCALE
        )
        names = (wanted.dq, wanted.dk, wanted.dv, wanted.dtq, wanted.dtk, wanted.dtv)
        found = got(inputs, ours, with_lse=with_lse)
        for mine, theirs in zip(found, names[: len(found)], strict=True):
            close(mine, theirs, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_all_quantities_over_masks_and_groups(name: str, heads: tuple[int, int]) -> None:
    inputs = draw(MASKS[name](), heads=heads)
    with small_tiles():
        check_everything(inputs, with_lse=True)


@pytest.mark.parametrize(
    "widths", [(16, 16), (17, 3), (24, 40), (40, 24), (64, 64), (1, 1), (256, 128), (128, 256)], ids=str
)
def test_widths_of_keys_and_values(widths: tuple[int, int]) -> None:
    with small_tiles():
        check_everything(draw(masks.block_causal([9, 14, 10]), widths=widths, heads=(2, 1)), with_lse=False)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(mask_cases(max_tokens=90, batch=BATCH), st.sampled_from([(2, 2), (4, 2), (4, 1)]), st.booleans())
def test_any_mask_with_any_activity(case: MaskCase, heads: tuple[int, int], with_lse: bool) -> None:
    with small_tiles():
        check_everything(draw(case.mask, heads=heads), with_lse=with_lse)


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def width_first(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    return x[:1, :1].expand(x.shape)


LAYOUTS = (tokens_first, width_first, every_other, expanded)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tangent_layout", LAYOUTS)
def test_layouts_of_primals_and_tangents(layout: Callable[..., Tensor], tangent_layout: Callable[..., Tensor]) -> None:
    inputs = draw(masks.teacher_forcing([7, 5], clean_is_constant=True))
    laid = Inputs(
        triple(layout(x) for x in inputs.primals), triple(tangent_layout(x) for x in inputs.tangents), inputs.mask
    )
    assert not any(x.is_contiguous() for x in (*laid.primals, *laid.tangents))
    with small_tiles():
        check_everything(laid, with_lse=True)


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["mixed", "teacher_forcing_constant"])
def test_a_missing_tangent_is_zero(name: str, missing: tuple[int, ...]) -> None:
    inputs = draw(MASKS[name]())
    zeroed = triple(x * 0 if i in missing else x for i, x in enumerate(inputs.tangents))
    full = Inputs(inputs.primals, zeroed, inputs.mask)
    tq, tk, tv = (None if i in missing else x for i, x in enumerate(inputs.tangents))
    with small_tiles():
        output, lse, tangent, mean = tiled_forward_jvp(*inputs.primals, tq, tk, tv, mask=inputs.mask, scale=SCALE)
        result = AttentionResult(output, lse, tangent, mean)
        same(result, exact(full))
        grad_output, grad_tangent, grad_lse = cotangents(result)
        saved, known = Saved(*inputs.primals, output, lse), SavedTangents(tq, tk, tv, tangent, mean)
        grads = tiled_tangent_backward(saved, known, grad_output, grad_tangent, grad_lse, mask=inputs.mask, scale=SCALE)
        wanted = all_gradients(full, result, with_lse=True)
    assert [place for place in range(3) if grads[3 + place] is None] == list(missing)
    for got, full_grad in zip(grads, wanted, strict=True):
        if got is not None:
            close(got, full_grad)


def test_zero_tangents_give_exact_zeros() -> None:
    inputs = draw(masks.block_causal([20, 30, 25]))
    zeros = triple(torch.zeros_like(x) for x in inputs.primals)
    with small_tiles():
        result = tiled(Inputs(inputs.primals, zeros, inputs.mask))
    assert result.tangent is not None
    assert result.mean is not None
    assert result.tangent.count_nonzero() == result.mean.count_nonzero() == 0
    assert result.output.count_nonzero() == result.output.numel()


def test_clean_half_has_exactly_no_tangent() -> None:
    inputs = draw(masks.teacher_forcing([9, 13, 6], clean_is_constant=True))
    with small_tiles():
        result = tiled(inputs)
    assert result.tangent is not None
    assert result.tangent[:, :, :28].count_nonzero() == 0
    assert result.tangent[:, :, 28:].count_nonzero() == BATCH * 4 * 28 * 5


def test_tangent_is_linear() -> None:
    mask = MASKS["window_sink"]()
    a, b = draw(mask, seed=1), draw(mask, seed=2)
    mixture = triple(2 * x - 3 * y for x, y in zip(a.tangents, b.tangents, strict=True))
    with small_tiles():
        first, second = tiled(a), tiled(Inputs(a.primals, b.tangents, mask))
        both = tiled(Inputs(a.primals, mixture, mask))
    assert first.tangent is not None
    assert second.tangent is not None
    assert first.mean is not None
    assert second.mean is not None
    close(both.tangent, 2 * first.tangent - 3 * second.tangent)
    close(both.mean, 2 * first.mean - 3 * second.mean)


def test_a_tangent_common_to_all_keys_moves_the_mean_alone() -> None:
    inputs = draw(MASKS["block_causal"]())
    q, (tq, tk, tv) = inputs.primals[0], inputs.tangents
    common = torch.randn(BATCH, 2, 1, 6, dtype=torch.float64)
    with small_tiles():
        plain, moved = tiled(inputs), tiled(Inputs(inputs.primals, (tq, tk + common, tv), inputs.mask))
    assert plain.mean is not None
    close(moved.tangent, plain.tangent)
    close(moved.mean, plain.mean + (q @ common.repeat_interleave(2, 1).mT).squeeze(-1) * SCALE)


def test_mean_is_the_slope_of_lse() -> None:
    inputs = draw(MASKS["causal"]())
    q, k, v = inputs.primals
    tq, tk, _ = inputs.tangents
    step = 1e-5
    with small_tiles():
        ahead = tiled_forward(q + step * tq, k + step * tk, v, mask=inputs.mask, scale=SCALE)[1]
        behind = tiled_forward(q - step * tq, k - step * tk, v, mask=inputs.mask, scale=SCALE)[1]
        close(tiled(inputs).mean, (ahead - behind) / (2 * step), 1e-8)


@pytest.mark.parametrize(
    "tiles", [((512, 256, 128), 64, 512), ((64,), 16, 16), ((16,), 64, 64), ((7,), 5, 15)], ids=str
)
@pytest.mark.parametrize("name", ["mixed", "holes", "teacher_forcing_window", "lengths"])
def test_tile_sizes_do_not_matter(name: str, tiles: tuple[tuple[int, ...], int, int]) -> None:
    with small_tiles(*tiles):
        check_everything(draw(MASKS[name]()), with_lse=True)


@pytest.mark.parametrize(
    ("name", "size", "groups"), [("lengths", 1, 6), ("lengths", 10**5, 2), ("mixed", 4 * 10**5, 4), ("mixed", 10**6, 2)]
)
def test_groups_of_heads_do_not_matter(name: str, size: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tiles, "GROUP_BYTES", size)
    inputs = draw(MASKS[name](), heads=(6, 3))
    tiling = attention_tiles.tiling_of(inputs.mask)
    plan = attention_tiles.head_groups(*inputs.primals[:2], tiling, upcasts=False, buffers=2)
    assert len(list(plan)) == groups
    check_everything(inputs, with_lse=True)


@pytest.mark.parametrize("constant", [False, True])
def test_tiles_of_real_size(constant: bool) -> None:
    mask = masks.teacher_forcing([70, 131, 200, 3], window=3, sink=1, clean_is_constant=constant)
    check_everything(draw(mask, heads=(2, 1), batch=1), with_lse=True)


def test_plain_forward_is_the_first_half() -> None:
    inputs = draw(MASKS["mixed"]())
    with small_tiles():
        output, lse = tiled_forward(*inputs.primals, mask=inputs.mask, scale=SCALE)
        close(output, attention_reference(*inputs.primals, mask=inputs.mask, scale=SCALE).output)
        close(lse, tiled(inputs).lse)
