"""Tangents through whole stock diffusers networks."""

# diffusers annotates narrower types than it takes.
# pyright: reportArgumentType=false

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_processor import AttnProcessor, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.core.tangents.network import check_denoiser_jvp, use_jvp_attention
from fewstep.core.tangents.processors import (
    JvpJointAttention,
    JvpSanaAttention,
    JvpUnetAttention,
    JvpWanAttention,
)
from fewstep.kernels.check_jvp import Float64Inside, check_jvp
from fewstep.kernels.mask import AttentionMask, block_causal, teacher_forcing
from fewstep.kernels.mask_conversion import dense
from tests.tiny_networks import CASES, WAN_FRAME_TOKENS, NetworkCase, build_case, build_wan, distance, draw, jvp
from tests.tiny_pipelines import build_sd3, build_sd15

PROCESSORS = {"sd3": JvpJointAttention, "sana": JvpSanaAttention, "wan": JvpWanAttention, "sd": JvpUnetAttention}


def directions(case: NetworkCase) -> tuple[Tensor, Tensor, Tensor]:
    """A direction of the case's point."""
    x, timestep, tokens = (draw(tuple(p.shape), 5 + i, p.dtype) for i, p in enumerate(case.point))
    return x, timestep, tokens


def tangent_of(case: NetworkCase, network: Any | None = None) -> tuple[Tensor, Tensor]:
    """Output and tangent of the case at its point along its direction."""
    network = case.network if network is None else network
    return jvp(lambda *point: case.call(network, *point), case.point, directions(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_output_names_and_weights_are_the_stock_ones(name: str, dtype: torch.dtype, bound: float) -> None:
    case = build_case(name, dtype)
    stock, weights = case.call(case.network, *case.point), copy.deepcopy(case.network.state_dict())
    use_jvp_attention(case.network)
    processors = dict(case.network.attn_processors)
    use_jvp_attention(case.network)
    assert dict(case.network.attn_processors) == processors
    kinds = {type(processor) for processor in processors.values()} - {SanaLinearAttnProcessor2_0}
    assert kinds == {next(kind for start, kind in PROCESSORS.items() if name.startswith(start))}
    assert distance(case.call(case.network, *case.point), stock) < bound
    assert list(case.network.state_dict()) == list(weights)
    assert distance(case.call(copy.deepcopy(case.network), *case.point), stock) < bound


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tangent_is_that_of_plain_attention(name: str) -> None:
    case = build_case(name)
    stock = copy.deepcopy(case.network)
    use_jvp_attention(case.network)
    with torch.no_grad():
        output, tangent = tangent_of(case)
        with sdpa_kernel(SDPBackend.MATH):
            expected_output, expected = tangent_of(case, stock)
    assert distance(output, expected_output) < 1e-12
    assert distance(tangent, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tangent_is_the_derivative_in_every_direction(name: str) -> None:
    case = build_case(name)
    use_jvp_attention(case.network)
    steps = zip(("x", "timestep", "tokens"), directions(case), strict=True)
    for place, (part, direction) in enumerate(steps):
        chosen: list[Tensor | None] = [None, None, None]
        chosen[place] = direction
        # What diffusers computes in fp32 would leave differences good to 1e-5 only, along time above all. SANA has
        # kinks (ReLU), between which the smallest steps stay.
        with Float64Inside():
            found = check_jvp(lambda *point: case.call(case.network, *point), case.point, chosen, halvings=16)
        assert found.error < 1e-9, part
        assert found.norm > 1e-3, part


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_fp32_inside_a_network_costs_a_tangent_little(name: str) -> None:
    case = build_case(name)
    use_jvp_attention(case.network)
    with Float64Inside():
        _, exact = tangent_of(case)
    _, tangent = tangent_of(case)
    assert distance(tangent, exact) < 1e-6
    single = build_case(name, torch.float32)
    use_jvp_attention(single.network)
    _, tangent = tangent_of(single)
    assert tangent.dtype == torch.float32
    assert distance(tangent, exact) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_bf16_tangent_is_near_that_of_fp32(name: str) -> None:
    half = build_case(name, torch.bfloat16)
    use_jvp_attention(half.network)
    _, tangent = tangent_of(half)
    assert tangent.dtype == torch.bfloat16
    # The same rounded weights and inputs, computed in fp32.
    single = copy.deepcopy(half.network).float()
    case = build_case(name, torch.float32)
    point = (half.point[0].float(), half.point[1], half.point[2].float())
    moved = directions(half)
    wide = (moved[0].float(), moved[1], moved[2].float())
    _, expected = jvp(lambda *at: case.call(single, *at), point, wide)
    assert distance(tangent, expected) < 0.05


@pytest.mark.parametrize("name", ["sd3-counts", "sd3.5", "sana", "wan-image", "sdxl"])
def test_weights_get_the_stock_gradient_beside_a_tangent(name: str) -> None:
    case = build_case(name)
    stock = copy.deepcopy(case.network)
    use_jvp_attention(case.network)
    weight = draw(tuple(case.point[0].shape), 9, torch.float64)
    with Float64Inside():
        output, tangent = tangent_of(case)
        # The tangent is a constant in consistency losses.
        (output * (weight + tangent.detach())).sum().backward()
        (case.call(stock, *case.point) * (weight + tangent.detach())).sum().backward()
    expected = {key: p.grad for key, p in stock.named_parameters() if p.grad is not None}
    found = {key: p.grad for key, p in case.network.named_parameters() if p.grad is not None}
    assert list(found) == list(expected)
    total = torch.cat([grad.flatten() for grad in expected.values()])
    assert distance(torch.cat([grad.flatten() for grad in found.values()]), total) < 1e-12


def test_tangents_carried_layer_by_layer_are_those_of_the_whole() -> None:
    case = build_case("wan")
    use_jvp_attention(case.network)
    blocks = case.network.blocks
    tokens, text = draw((2, 12, 24), 1, torch.float64), draw((2, 5, 24), 2, torch.float64)
    modulation = draw((2, 6, 24), 3, torch.float64)
    rotary = case.network.rope(case.point[0])
    moved = (draw((2, 12, 24), 4, torch.float64), draw((2, 6, 24), 5, torch.float64))

    def through(block: Any, x: Tensor, temb: Tensor) -> Tensor:
        return block(x, text, temb, rotary)

    def both(x: Tensor, temb: Tensor) -> Tensor:
        return through(blocks[1], through(blocks[0], x, temb), temb)

    with torch.no_grad():
        output, tangent = jvp(both, (tokens, modulation), moved)
    x, tx = tokens, moved[0]
    for block in blocks:
        x, tx = jvp(lambda x, temb, block=block: through(block, x, temb), (x, modulation), (tx, moved[1]))
        tx = tx.detach()
    assert distance(x, output) < 1e-6
    assert distance(tx, tangent) < 1e-6


class DenseMaskWanAttention(WanAttnProcessor):
    """The stock processor with a dense mask in self-attention."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.dense = mask

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        mask = self.dense if encoder_hidden_states is None else None
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


def set_self_attention_mask(network: Any, mask: AttentionMask) -> None:
    """Put the mask on every self-attention."""
    for block in network.blocks:
        block.attn1.set_processor(JvpWanAttention(mask))


def test_wan_with_a_block_causal_mask() -> None:
    mask = block_causal([WAN_FRAME_TOKENS, 2 * WAN_FRAME_TOKENS])
    case = build_case("wan")
    stock = copy.deepcopy(case.network)
    for block in stock.blocks:
        block.attn1.set_processor(DenseMaskWanAttention(dense(mask)[0]))
    use_jvp_attention(case.network)
    unmasked, _ = tangent_of(case)
    set_self_attention_mask(case.network, mask)
    use_jvp_attention(case.network)
    with torch.no_grad():
        output, tangent = tangent_of(case)
        with sdpa_kernel(SDPBackend.MATH):
            expected_output, expected = tangent_of(case, stock)
    assert distance(output, expected_output) < 1e-12
    assert distance(tangent, expected) < 1e-12
    assert distance(output, unmasked) > 1e-2
    with Float64Inside():
        found = check_jvp(
            lambda *point: case.call(copy.deepcopy(case.network), *point), case.point, directions(case), halvings=10
        )
    assert found.error < 1e-9


# With side 4 clean and noisy queries share a tile of the CPU kernel.
@pytest.mark.parametrize("side", [4, 16])
def test_clean_half_of_teacher_forcing_has_no_tangent(side: int) -> None:
    """Stock Wan blocks with a modulation per token; clean tokens have constant ones, and `verify` checks each layer."""
    network: Any = build_wan().double()
    use_jvp_attention(network)
    chunks = [side * side // 4] * 2
    count = sum(chunks)
    mask = teacher_forcing(chunks, clean_is_constant=True)
    mask = mask.with_activity(queries=mask.query_active, keys=mask.key_active, verify=True)
    set_self_attention_mask(network, mask)
    clean, noisy = draw((1, count, 24), 1, torch.float64), draw((1, count, 24), 2, torch.float64)
    text, modulation = draw((1, 5, 24), 3, torch.float64), draw((1, 2 * count, 6, 24), 4, torch.float64)
    rotary = [torch.cat([part, part], dim=1) for part in network.rope(torch.zeros(1, 4, 2, side, side).double())]

    def stack(x: Tensor, temb: Tensor) -> Tensor:
        packed = torch.cat([clean, x], dim=1)
        temb = torch.cat([modulation[:, :count], temb], dim=1)
        for block in network.blocks:
            packed = block(packed, text, temb, rotary)
        return packed

    point = (noisy, modulation[:, count:])
    moved = (draw((1, count, 24), 5, torch.float64), draw((1, count, 6, 24), 6, torch.float64))
    with torch.no_grad(), Float64Inside():
        _, tangent = jvp(stack, point, moved)
        found = check_jvp(stack, point, moved, halvings=10)
    assert torch.count_nonzero(tangent[:, :count]) == 0
    assert torch.count_nonzero(tangent[:, count:]) == count * 24
    assert found.error < 1e-9
    # A clean token that moves breaks the promise.
    packed = torch.cat([clean, noisy], dim=1)
    with torch.no_grad(), pytest.raises(ValueError, match="promises that the tangent of q is zero"):
        jvp(lambda x: network.blocks[0](x, text, modulation, rotary), (packed,), (packed.sin(),))


def test_saved_network_is_a_stock_one(tmp_path: Path) -> None:
    network = build_wan()
    x, timestep, text = draw((1, 4, 3, 4, 4), 1, torch.float32), torch.tensor([3.0]), draw((1, 5, 16), 2, torch.float32)
    expected = network(x, timestep, text).sample
    use_jvp_attention(network)
    network.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert {type(processor) for processor in loaded.attn_processors.values()} == {WanAttnProcessor}
    # Weights read from a file lie elsewhere in memory, which changes the order of sums on some CPUs (1.7e-7 was seen).
    assert distance(loaded(x, timestep, text).sample, expected) < 1e-6


def test_unknown_networks_and_processors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no attention.*finite differences"):
        use_jvp_attention(torch.nn.Linear(2, 2))
    network = build_sd15().unet
    network.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match="is a AttnProcessor"):
        use_jvp_attention(network)
    assert {type(processor) for processor in network.attn_processors.values()} == {AttnProcessor}


@pytest.mark.slow
@pytest.mark.parametrize(("build", "dtype"), [(build_sd3, torch.float64), (build_sd15, torch.float32)])
def test_denoiser_check(build: Any, dtype: torch.dtype) -> None:
    pipeline = build()
    family = build_family(pipeline)
    condition = family.encode_prompts(pipeline, ["ab", "c"])
    denoiser = Denoiser(family.network(pipeline), family).to(dtype)
    x, t = draw((2, 4, 8, 8), 1, torch.float64), torch.tensor([0.3, 0.62])
    with pytest.raises(ValueError, match=r"along the state: the function has no forward mode.*use_jvp_attention"):
        check_denoiser_jvp(denoiser, x, t, condition)
    use_jvp_attention(denoiser.network)
    found = check_denoiser_jvp(denoiser, x, t, condition, tolerance=2e-3)
    assert found.state.error < (1e-10 if dtype == torch.float64 else 1e-4)
    assert found.time.error < 2e-3
    if dtype == torch.float64:
        with Float64Inside():
            found = check_denoiser_jvp(denoiser, x, t, condition, dx=torch.ones_like(x), dt=torch.full((2,), 2.0))
        assert found.time.error < 1e-9
