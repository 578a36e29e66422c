"""Adapters for ComfyUI: its names, and that stock diffusers makes the same change of the weights of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.core.export.comfyui import layer_name, write_comfyui
from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import add_lora, lora_state_dict
from tests.tiny_pipelines import build_sd3, build_sd15, build_sdxl
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

BUILDERS: dict[str, Any] = {
    "sd3": build_sd3,
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "wan": lambda: build_video_pipeline(text_tokens=8),
}


def adapted(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A pipeline with adapters that do something, and what they add to each layer."""
    pipeline = BUILDERS[name]()
    network = pipeline.unet if name.startswith("sd1") or name == "sdxl" else pipeline.transformer
    add_lora(network, rank=2, alpha=3.0, targets=build_family(pipeline).lora_targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return pipeline, lora_state_dict(network)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_stock_diffusers_reads_the_same_change(tmp_path: Path, name: str) -> None:
    _, state = adapted(name)
    family = build_family(BUILDERS[name]()).name
    assert write_comfyui(state, tmp_path, family=family, scale=1.5, dtype=torch.float32)
    stock = BUILDERS[name]()
    network = stock.unet if family == "unet" else stock.transformer
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    stock.load_lora_weights(tmp_path / "comfyui")
    stock.fuse_lora()
    stock.unload_lora_weights()
    after, changed = network.state_dict(), 0
    for key, tensor in before.items():
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in state:
            delta = 1.5 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            torch.testing.assert_close(after[key], tensor + delta, rtol=1e-5, atol=1e-6)
            changed += 1
        else:
            assert torch.equal(after[key], tensor), key
    assert changed == len(state) // 2
    stored = load_file(tmp_path / "comfyui" / "lora.safetensors")
    prefix = {"unet": "lora_unet_", "sd3": "transformer.", "wan": "diffusion_model."}[family]
    assert all(key.startswith(prefix) for key in stored)


def test_names_of_each_model() -> None:
    assert layer_name("down_blocks.1.attentions.0.proj_in", "unet") == "lora_unet_down_blocks_1_attentions_0_proj_in"
    assert layer_name("transformer_blocks.3.attn.to_q", "sd3") == "transformer.transformer_blocks.3.attn.to_q"
    assert layer_name("blocks.7.attn1.to_out.0", "wan") == "diffusion_model.blocks.7.self_attn.o"
    assert layer_name("blocks.7.attn2.to_k", "wan") == "diffusion_model.blocks.7.cross_attn.k"
    assert layer_name("blocks.7.ffn.net.0.proj", "wan") == "diffusion_model.blocks.7.ffn.0"
    assert layer_name("condition_embedder.time_proj", "wan") is None
    assert layer_name("transformer_blocks.0.attn1.to_q", "sana") is None


def test_a_model_that_comfyui_does_not_know_gets_no_file(tmp_path: Path) -> None:
    pipeline = build_sana()
    add_lora(pipeline.transformer, rank=2, alpha=2.0, targets=("attn1.to_q",), seed=0)
    state = lora_state_dict(pipeline.transformer)
    assert not write_comfyui(state, tmp_path, family="sana", scale=1.0, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
