"""Networks with a second time: equal to the teacher at r = t, differentiable, and told both times."""

# diffusers annotates narrower types than it takes.
# pyright: reportArgumentType=false

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import add_lora
from fewstep.core.tangents.network import check_denoiser_jvp, use_jvp_attention
from fewstep.core.training.ema import Ema
from fewstep.core.two_time import (
    GATE,
    SITES,
    SecondTime,
    add_second_time,
    holds_second_time,
    network_times,
    second_time_of,
)
from fewstep.kernels.check_jvp import Float64Inside, check_jvp
from tests.tiny_networks import WAN_FRAME_TOKENS, WAN_LATENT_SHAPE, build_wan, draw
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15

KINDS: tuple[SecondTime, ...] = get_args(SecondTime)
T, R = torch.tensor([0.8, 0.35]).double(), torch.tensor([0.2, 0.35]).double()


def build(kind: SecondTime | None, *, sd35: bool = False, shaken: bool = False) -> tuple[Denoiser, Condition]:
    """A tiny SD3 in float64 with that second time, or none; `shaken` moves every weight a little, the same in any."""
    pipeline = build_sd3(sd35=sd35)
    family = build_family(pipeline)
    condition = family.encode_prompts(pipeline, ["ab", "c"]).to(dtype=torch.float64)
    denoiser = Denoiser(pipeline.transformer, family).double()
    if kind is not None:
        add_second_time(denoiser.network, kind)
    if shaken:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return denoiser, condition


def state() -> Tensor:
    return draw((2, *LATENT_SHAPE), 1, torch.float64)


@pytest.mark.parametrize("sd35", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_at_equal_times_the_network_is_the_teacher(kind: SecondTime, sd35: bool) -> None:
    (teacher, condition), (student, _) = build(None, sd35=sd35), build(kind, sd35=sd35)
    expected = teacher(state(), T, condition)
    assert (student(state(), T, condition, T) - expected).abs().max() < 1e-14
    assert (student(state(), T, condition) - expected).abs().max() < 1e-14
    apart = (student(state(), T, condition, R) - expected).abs().amax(dim=(1, 2, 3))
    # The second sample has r = t.
    assert apart[1] < 1e-14
    if kind == "sum":
        assert apart[0] < 1e-14
    else:
        assert apart[0] > 1e-4


@torch.no_grad()
def test_embeddings_are_those_of_the_equations() -> None:
    sinusoids = draw((4, 256), 2, torch.float64)
    for kind in KINDS:
        student, _ = build(kind, shaken=True)
        layers = second_time_of(student.network)
        assert layers is not None
        first = layers.first(sinusoids)
        if kind == "decoupled":
            assert torch.equal(layers(sinusoids), first)
            assert not hasattr(layers, "second")
            continue
        second = layers.second(sinusoids)
        weights = (1 - GATE, GATE) if kind == "gate" else (1.0, 1.0)
        expected = weights[0] * first[:2] + weights[1] * second[2:]
        assert torch.allclose(layers(sinusoids), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_times(kind: SecondTime) -> None:
    student, _ = build(kind)
    second = [0.6, 0.0] if kind == "sum" else [0.2, 0.35]
    assert network_times(student.network, T, R).tolist() == pytest.approx([0.8, 0.35, *second])
    frames = torch.full((2, 3), 0.5)
    assert network_times(student.network, frames, None).shape == (4, 3)
    with pytest.raises(ValueError, match=r"r must have the shape \(2,\)"):
        network_times(student.network, T, R[:1])
    assert network_times(build(None)[0].network, T, None) is T
    with pytest.raises(ValueError, match="has one time and is given r"):
        network_times(build(None)[0].network, T, R)


@torch.no_grad()
def test_decoupled_blocks_see_their_own_time() -> None:
    """Three blocks, of which two see t: the last block alone tells r apart."""
    student, condition = build("decoupled")
    network: Any = student.network
    seen: list[Tensor] = []
    handles = [
        block.norm1.register_forward_pre_hook(lambda _, __, named: seen.append(named["emb"]), with_kwargs=True)
        for block in network.transformer_blocks
    ]
    student(state(), T, condition, R)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], seen[1])
    stock: Any = build(None)[0].network
    pooled = condition.pooled
    assert torch.allclose(seen[0], stock.time_text_embed(1000 * T, pooled), atol=1e-14)
    assert torch.allclose(seen[2], stock.time_text_embed(1000 * R, pooled), atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tangent_along_state_and_both_times(kind: SecondTime) -> None:
    student, condition = build(kind, shaken=True)
    use_jvp_attention(student.network)
    point = (state(), torch.tensor([0.0008, 0.0005]).double(), torch.tensor([0.0002, 0.0001]).double())
    moved = (draw(tuple(point[0].shape), 7, torch.float64), torch.tensor([1e-3, 1e-3]), torch.tensor([2e-3, -1e-3]))
    for place in range(3):
        directions: list[Tensor | None] = [None, None, None]
        directions[place] = moved[place].double()
        with Float64Inside():
            found = check_jvp(lambda x, t, r: student(x, t, condition, r), point, directions, halvings=16)
        assert found.error < 1e-9, place
        assert found.norm > 1e-4, place


def test_the_check_before_a_run_knows_the_second_time() -> None:
    student, condition = build("gate", shaken=True)
    use_jvp_attention(student.network)
    with Float64Inside():
        found = check_denoiser_jvp(student, state(), T, condition, r=R / 2)
    assert found.time.error < 1e-9
    assert found.time.norm > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_copies_averages_and_files_keep_the_second_time(kind: SecondTime, tmp_path: Path) -> None:
    student, condition = build(kind, shaken=True)
    twin = copy.deepcopy(student)
    expected = student(state(), T, condition, R)
    assert torch.equal(twin(state(), T, condition, R), expected)
    assert torch.equal(student.copy()(state(), T, condition, R), expected)
    with Ema(student, 0.9).applied(student):
        assert torch.equal(student(state(), T, condition, R), expected)
    other, _ = build(kind)
    other.load_state_dict(student.state_dict())
    assert torch.equal(other(state(), T, condition, R), expected)
    save_file(student.state_dict(), tmp_path / "two.safetensors")
    save_file(build(None)[0].state_dict(), tmp_path / "one.safetensors")
    assert holds_second_time(tmp_path / "two.safetensors")
    assert not holds_second_time(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        holds_second_time(tmp_path / "none.safetensors")


def test_gradient_reaches_both_embeddings_also_beside_adapters() -> None:
    pipeline = build_sd3()
    family = build_family(pipeline)
    network = pipeline.transformer
    add_lora(network, rank=2, alpha=2.0, targets=family.lora_targets, seed=0)
    add_second_time(network, "gate")
    trained = {name.split(".lora_")[0] for name, value in network.named_parameters() if value.requires_grad}
    layers = {name for name in trained if "timestep_embedder" in name}
    prefix = "time_text_embed.timestep_embedder.second"
    assert layers == {f"{prefix}.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    condition = family.encode_prompts(pipeline, ["ab", "c"])
    output = Denoiser(network, family)(state().float(), T.float(), condition, R.float())
    output.square().mean().backward()
    gradient = network.get_submodule(prefix).linear_1.weight.grad
    assert gradient is not None
    assert gradient.norm() > 0


@torch.no_grad()
def test_checkpointed_blocks_give_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        student, condition = build("decoupled")
        if checkpointing:
            network: Any = student.network
            network.enable_gradient_checkpointing()
        student.train()
        with torch.enable_grad():
            student(state(), T, condition, R).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert gradients[0].norm() > 1e-3


@pytest.mark.parametrize("kind", ["gate", "sum"])
@torch.no_grad()
def test_wan_takes_a_second_time(kind: SecondTime) -> None:
    network = build_wan()
    x, text = draw((2, *WAN_LATENT_SHAPE), 1, torch.float32), draw((2, 5, 16), 2, torch.float32)
    expected = network(x, torch.tensor([3.0, 4.0]), text).sample
    add_second_time(network, kind)
    times = network_times(network, torch.tensor([3.0, 4.0]), None)
    assert (network(x, times, text).sample - expected).abs().max() < 1e-5
    # A time for each token of the Wan 2.2 kind.
    tokens = WAN_LATENT_SHAPE[1] * WAN_FRAME_TOKENS
    per_token = torch.tensor([[3.0] * tokens, [4.0] * tokens])
    apart = network_times(network, per_token, per_token / 2)
    assert apart.shape == (4, tokens)
    moved = (network(x, apart, text).sample - expected).abs().max()
    assert (moved < 1e-5) if kind == "sum" else (moved > 1e-4)
    assert (network(x, network_times(network, per_token, None), text).sample - expected).abs().max() < 1e-5


def test_what_has_no_second_time_is_refused() -> None:
    with pytest.raises(ValueError, match="UNet2DConditionModel, only for SD3Transformer2DModel, Wan"):
        add_second_time(build_sd15().unet, "gate")
    with pytest.raises(ValueError, match="'decoupled' is not known for WanTransformer3DModel"):
        add_second_time(build_wan(), "decoupled")
    student, _ = build("gate")
    with pytest.raises(ValueError, match="has a second time already"):
        add_second_time(student.network, "sum")
    with pytest.raises(ValueError, match="unknown; choose gate, sum, decoupled"):
        add_second_time(student.network, "both")
    assert set(SITES) == {"SD3Transformer2DModel", "WanTransformer3DModel"}


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
@torch.no_grad()
def test_equal_times_are_the_teacher_anywhere(first: float, second: float) -> None:
    (teacher, condition), t = NETWORKS["none"], torch.tensor([first, second], dtype=torch.float64)
    expected = teacher(state(), t, condition)
    for kind in KINDS:
        assert (NETWORKS[kind][0](state(), t, condition, t) - expected).abs().max() < 1e-13


NETWORKS = {"none": build(None), **{kind: build(kind) for kind in KINDS}}
