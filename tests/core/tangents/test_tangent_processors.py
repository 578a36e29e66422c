"""Single attention processors with tangents: counts of keys, feature maps, masks, refusals."""

# diffusers annotates narrower types than it takes.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fewstep.core.tangents.network import use_jvp_attention
from fewstep.core.tangents.processors import (
    JvpJointAttention,
    JvpSanaAttention,
    JvpUnetAttention,
    JvpWanAttention,
    key_biased_attention,
)
from fewstep.core.teacher import Teacher
from fewstep.kernels.attention import attention
from fewstep.kernels.attention_dispatch import with_bias_columns
from fewstep.kernels.mask import block_causal, full
from tests.tiny_networks import build_sana, build_wan, distance, draw, jvp
from tests.tiny_pipelines import build_sd3


def test_mask_of_a_call_is_that_of_the_processor() -> None:
    network: Any = build_wan().double()
    use_jvp_attention(network)
    layer, x = network.blocks[0].attn1, draw((1, 8, 24), 1, torch.float64)
    mask = block_causal([4, 4])
    by_call = layer(x, mask=mask)
    assert distance(by_call, layer(x)) > 1e-2
    layer.set_processor(JvpWanAttention(mask))
    assert distance(by_call, layer(x)) == 0.0


@torch.no_grad()
def test_key_bias_counts_identical_keys() -> None:
    query, key, value = (draw((2, 3, 4 + i, 8), i, torch.float64)[:, :, :4] for i in range(3))
    bias = torch.tensor([[1.0, 7.0, 1.0, 3.0]], dtype=torch.float64).log()
    repeats = torch.tensor([1, 7, 1, 3])
    moved = tuple(draw((2, 3, 4, 8), 5 + i, torch.float64) for i in range(3))
    output, tangent = jvp(lambda q, k, v: key_biased_attention(q, k, v, bias), (query, key, value), moved)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        return scaled_dot_product_attention(query, key, value)

    with sdpa_kernel(SDPBackend.MATH):
        expected_output, expected = jvp(repeated, (query, key, value), moved)
    assert distance(output, expected_output) < 1e-14
    assert distance(tangent, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_key_bias_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    """With equal keys and values of 0 and 1 the output is a weight, which a bias rounded to bf16 would miss by 1e-2."""
    query, key = torch.ones(1, 1, 1, 64, dtype=dtype), torch.ones(1, 1, 3, 64, dtype=dtype)
    value = torch.tensor([0.0, 1.0, 1.0], dtype=dtype).view(1, 1, 3, 1).repeat(1, 1, 1, 64)
    # The true weight of the first key is 300 / 301, and the last one is hidden.
    bias = torch.tensor([[300.0, 1.0, 1.0]]).log() + torch.tensor([[0.0, 0.0, -10000.0]])
    moved = tuple(torch.ones_like(x) for x in (query, key, value))
    output, tangent = jvp(lambda q, k, v: key_biased_attention(q, k, v, bias), (query, key, value), moved)
    assert abs(float(output[0, 0, 0, 0]) - 1 / 301) < 1e-4 / 3
    assert distance(tangent, torch.ones_like(tangent)) < 1e-2


def test_a_key_bias_in_the_kernel_is_that_of_columns() -> None:
    """Outputs, tangents and gradients; also of a bias that is computed inside of what is differentiated, where all is
    wrapped. A compiled graph has the columns."""
    query, key, value = (draw((2, 3, 5 + i, 8), i, torch.float64)[:, :, :5] for i in range(3))
    moved = tuple(draw((2, 3, 5, 8), 5 + i, torch.float64) for i in range(3))
    bias = torch.tensor([[0.0, 2.0, -1e4, 0.5, -1.0], [1.0, -3.0, 0.0, 0.0, 4.0]], dtype=torch.float64)

    def both(attend: Any) -> list[Tensor]:
        points = tuple(x.clone().requires_grad_() for x in (query, key, value))
        output, tangent = jvp(lambda q, k, v: attend(q, k, v, bias), points, moved)
        return [output, tangent, *torch.autograd.grad(output.sin().sum(), points)]

    def columns(q: Tensor, k: Tensor, v: Tensor, row: Tensor) -> Tensor:
        wide_q, wide_k = with_bias_columns(q, k, row, 8**-0.5)
        return attention(wide_q, wide_k, v, scale=8**-0.5)

    def computed(q: Tensor, k: Tensor, v: Tensor, row: Tensor) -> Tensor:
        return key_biased_attention(q, k, v, torch.nn.functional.pad(row[:, :-1], (0, 1)))

    def padded(q: Tensor, k: Tensor, v: Tensor, row: Tensor) -> Tensor:
        return columns(q, k, v, torch.cat([row[:, :-1], torch.zeros_like(row[:, :1])], dim=1))

    for attend, reference in ((key_biased_attention, columns), (computed, padded)):
        for found, expected in zip(both(attend), both(reference), strict=True):
            assert distance(found, expected) < 1e-12
    wrapped = jvp(lambda x: key_biased_attention(query, key, value, x), (bias,), (bias,))[0]
    assert distance(wrapped, key_biased_attention(query, key, value, bias)) < 1e-12
    compiled = torch.compile(key_biased_attention, backend="aot_eager")
    for row in (bias, bias.flip(1)):
        assert distance(compiled(query, key, value, row), key_biased_attention(query, key, value, row)) < 1e-12


@pytest.mark.parametrize("cross", [False, True])
def test_unet_attention_on_feature_maps(cross: bool) -> None:
    layer = Attention(
        8, 6 if cross else None, heads=2, dim_head=4, norm_num_groups=2, residual_connection=True,
        rescale_output_factor=1.5, cross_attention_norm="layer_norm" if cross else None, qk_norm="layer_norm",
        processor=AttnProcessor2_0(),
    ).double()  # fmt: skip
    x, text = draw((2, 8, 3, 3), 1, torch.float64), draw((2, 5, 6), 2, torch.float64) if cross else None
    with sdpa_kernel(SDPBackend.MATH):
        expected = jvp(lambda x: layer(x, text), (x,), (x.sin(),))
    layer.set_processor(JvpUnetAttention())
    found = jvp(lambda x: layer(x, text), (x,), (x.sin(),))
    assert distance(found[0], expected[0]) < 1e-12
    assert distance(found[1], expected[1]) < 1e-12


def test_masks_that_do_not_fit_are_refused() -> None:
    network: Any = build_wan().double()
    use_jvp_attention(network)
    block = network.blocks[0]
    x, text = draw((1, 8, 24), 1, torch.float64), draw((1, 5, 24), 2, torch.float64)
    with pytest.raises(ValueError, match="not a dense attention_mask"):
        block.attn1(x, attention_mask=torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn1 alone"):
        block.attn2(x, text, mask=full(8, 5))
    network.set_attention_backend("native")
    with pytest.raises(ValueError, match="attention backend"):
        block.attn1(x)
    network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        block.attn1(x)
    sana: Any = build_sana()
    layer = sana.transformer_blocks[0].attn2
    layer.set_processor(JvpSanaAttention())
    for wrong in (torch.zeros(1, 4, 5), torch.zeros(1, 1, 4), torch.ones(1, 1, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"must be a bias \[1 or 1, 1, 5\]"):
            layer(torch.zeros(1, 4, 16), torch.zeros(1, 5, 16), wrong)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        JvpJointAttention()(None, x, None, torch.zeros(1))


def test_copy_of_a_denoiser_keeps_its_tangent() -> None:
    teacher = Teacher(build_sd3(), path="tiny")
    use_jvp_attention(teacher.denoiser.network)
    copied = teacher.denoiser.copy()
    processors: Any = copied.network.attn_processors
    assert {type(found) for found in processors.values()} == {JvpJointAttention}
    x, t = draw((1, *teacher.latent_shape()), 1, torch.float32), torch.tensor([0.4])
    condition = teacher.encode(["a word"])
    _, tangent = jvp(lambda x: copied(x, t, condition), (x,), (torch.ones_like(x),))
    assert tangent.norm() > 1e-3
