"""Adapters on a tiny random SD3 transformer: no change at first, deterministic, and gone after merging."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from fewstep.core.networks.lora import add_lora, lora_state_dict, merge_lora

TO_Q = "transformer_blocks.0.attn.to_q"
TARGETS = ("attn.to_q", "to_out.0", "ff.net.2")


def make_network(dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    # Called through nn.Module, because the decorator on the model's own `to` hides its signature from type checkers.
    nn.Module.to(network, dtype)
    return network.eval()


def call(network: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 8, 8), (2, 5, 12), (2, 10))
    x, tokens, pooled = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return network(x, tokens, pooled, torch.tensor([300.0, 700.0]), return_dict=False)[0]


def randomise_adapters(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def test_adapters_change_nothing_at_first_and_are_alone_trainable() -> None:
    network = make_network()
    expected = call(network).detach()
    add_lora(network, rank=3, alpha=6, targets=TARGETS, seed=5)
    assert torch.equal(call(network), expected)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    # Per block: to_q and to_out of width 16, ff of 64 -> 16; block 1 is the last and has no context feed-forward.
    per_block = 2 * 3 * (16 + 16) + 3 * (64 + 16)
    assert sum(p.numel() for p in trainable.values()) == 2 * per_block
    call(network).square().mean().backward()
    assert max(p.grad.abs().max().item() for p in trainable.values() if p.grad is not None) > 0
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


def test_merging_keeps_the_output_and_the_original_keys() -> None:
    network = make_network()
    original = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = call(network).detach()
    add_lora(network, rank=3, alpha=6, targets=TARGETS, seed=5)
    randomise_adapters(network)
    expected_weight = original[f"{TO_Q}.weight"] + 2.0 * (
        network.get_parameter(f"{TO_Q}.lora_B.default.weight") @ network.get_parameter(f"{TO_Q}.lora_A.default.weight")
    )
    adapted = call(network).detach()
    assert (adapted - before).abs().max().item() > 1e-2
    merge_lora(network)
    torch.testing.assert_close(call(network).detach(), adapted, rtol=1e-5, atol=1e-5)
    assert list(network.state_dict()) == list(original)
    torch.testing.assert_close(network.state_dict()[f"{TO_Q}.weight"], expected_weight.detach())
    untouched = [name for name in original if not any(name.endswith(f"{t}.weight") for t in TARGETS)]
    assert all(torch.equal(network.state_dict()[name], original[name]) for name in untouched)
    assert type(network.get_submodule(TO_Q)) is nn.Linear


def test_adapters_can_be_added_again_after_merging() -> None:
    network = make_network()
    add_lora(network, rank=2, alpha=2, targets=TARGETS, seed=5)
    randomise_adapters(network)
    merge_lora(network)
    expected = call(network).detach()
    add_lora(network, rank=4, alpha=2, targets=TARGETS, seed=6)
    assert torch.equal(call(network), expected)
    assert lora_state_dict(network)[f"{TO_Q}.lora_A.weight"].shape == (4, 16)


def test_initialisation_depends_on_the_seed_alone() -> None:
    states = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        network = make_network()
        torch.manual_seed(global_seed)
        add_lora(network, rank=3, alpha=6, targets=TARGETS, seed=seed)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(global_seed)))
        states.append({name: tensor.clone() for name, tensor in lora_state_dict(network).items()})
    assert len(states[0]) == 12
    name = "transformer_blocks.1.ff.net.2.lora_A.weight"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    assert states[0][name].shape == (3, 64)
    assert 0.9 / 8 < states[0][name].abs().max().item() <= 1 / 8
    assert states[0][name.replace("lora_A", "lora_B")].abs().sum().item() == 0


def test_adapters_of_a_bf16_network_are_fp32() -> None:
    network = make_network(torch.bfloat16)
    add_lora(network, rank=2, alpha=2, targets=TARGETS, seed=0)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    assert call(network, torch.bfloat16).dtype == torch.bfloat16
    merge_lora(network)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_convolutions_of_a_unet() -> None:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()
    keys = list(network.state_dict())
    x, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    expected = network(x, 3, tokens).sample.detach()
    add_lora(network, rank=2, alpha=2, targets=("conv1", "to_k"), seed=0)
    assert torch.equal(network(x, 3, tokens).sample, expected)
    randomise_adapters(network)
    adapted = network(x, 3, tokens).sample.detach()
    assert (adapted - expected).abs().max().item() > 1e-3
    merge_lora(network)
    torch.testing.assert_close(network(x, 3, tokens).sample.detach(), adapted, rtol=1e-5, atol=1e-5)
    assert list(network.state_dict()) == keys


def test_a_copy_keeps_its_own_adapters() -> None:
    network = make_network()
    add_lora(network, rank=2, alpha=2, targets=TARGETS, seed=0)
    twin = copy.deepcopy(network)
    randomise_adapters(twin)
    merge_lora(twin)
    assert torch.equal(call(network), call(make_network()))


def test_errors() -> None:
    network = make_network()
    with pytest.raises(ValueError, match="diffusers model"):
        add_lora(nn.Linear(2, 2), rank=1, alpha=1, targets=("x",), seed=0)
    with pytest.raises(ValueError, match=r"\['to_nothing'\] match no layer"):
        add_lora(network, rank=1, alpha=1, targets=("attn.to_q", "to_nothing"), seed=0)
    with pytest.raises(ValueError, match=r"\[\] match no layer"):
        add_lora(network, rank=1, alpha=1, targets=(), seed=0)
    for rank, alpha in ((0, 1.0), (1, 0.0), (1, -1.0)):
        with pytest.raises(ValueError, match="rank >= 1 and alpha > 0"):
            add_lora(network, rank=rank, alpha=alpha, targets=TARGETS, seed=0)
    with pytest.raises(ValueError, match="no LoRA adapters to merge"):
        merge_lora(network)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        lora_state_dict(network)
    assert all(p.requires_grad for p in network.parameters())
    add_lora(network, rank=1, alpha=1, targets=TARGETS, seed=0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(network, rank=1, alpha=1, targets=TARGETS, seed=0)
