"""FLUX.2 dev and klein in canonical coordinates, against their stock pipelines."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

from fewstep.core.families.flux2 import require_flux2
from fewstep.core.families.parts.latents import flatten_positions
from fewstep.core.families.table import build_family, configs_of
from fewstep.core.teacher import Teacher
from tests.core.families.checks import PROMPTS, FamilyChecks, TinyModel, export_student, noise_of
from tests.tiny_networks import widen_weights
from tests.tiny_text import build_qwen3_causal, build_qwen_tokenizer

TEXT_TOKENS = 48
# The last of the layers that dev's and klein's text come from.
DEV_LAYERS, KLEIN_LAYERS = 30, 27
MISTRAL_CHAT = (
    "{% for message in messages %}[{{ message['role'][0] }}]"
    "{% for part in message['content'] %}{{ part['text'][:8] }}{% endfor %}{% endfor %}"
)


def build_patched_vae(resolutions: int = 1) -> AutoencoderKLFlux2:
    """Four latent channels, and statistics of its patches that are neither 0 nor 1."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * resolutions,
        down_block_types=("DownEncoderBlock2D",) * resolutions,
        up_block_types=("UpDecoderBlock2D",) * resolutions,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    statistics: dict[str, Any] = dict(vae.bn.named_buffers())
    statistics["running_mean"].copy_(0.3 * torch.randn(16, generator=generator))
    statistics["running_var"].copy_(0.5 + torch.rand(16, generator=generator))
    return vae


def build_network(width: int, *, dev: bool) -> Flux2Transformer2DModel:
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=dev,
    )
    widen_weights(network)
    return network.eval()


def build_klein(*, is_distilled: bool = False, resolutions: int = 1, seed: int = 0) -> Flux2KleinPipeline:
    """klein with one block of either kind."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer()
        tokenizer.model_max_length = TEXT_TOKENS
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=build_patched_vae(resolutions),
            text_encoder=build_qwen3_causal(tokenizer, width=16, layers=KLEIN_LAYERS + 1),
            tokenizer=tokenizer,
            transformer=build_network(48, dev=False),
            is_distilled=is_distilled,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_dev(*, seed: int = 0) -> Flux2Pipeline:
    """dev with one block of either kind."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer(extra=("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
        tokenizer.model_max_length = TEXT_TOKENS
        processor = PixtralProcessor(
            image_processor=PixtralImageProcessor(), tokenizer=tokenizer, patch_size=4, chat_template=MISTRAL_CHAT
        )
        text = {
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": DEV_LAYERS + 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        vision = {
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 16,
        }
        encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
        pipeline = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=build_patched_vae(),
            text_encoder=encoder.eval(),
            tokenizer=processor,
            transformer=build_network(48, dev=True),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


KLEIN = TinyModel(build_klein, {"height": 8, "width": 12}, guidance=4.0)
# dev's stock call guides by what its network is told alone.
DEV = TinyModel(build_dev, {"height": 8, "width": 12}, guidance=1.0)


# The stock call takes pictures of 64 pixels and more.
PICTURE_SIZE = {"height": 64, "width": 64}
KLEIN_PICTURE = dataclasses.replace(KLEIN, size=PICTURE_SIZE, told_picture=True)
DEV_PICTURE = dataclasses.replace(DEV, size=PICTURE_SIZE, told_picture=True)


class TestKleinWithAPicture(FamilyChecks):
    model = KLEIN_PICTURE


class TestDevWithAPicture(FamilyChecks):
    model = DEV_PICTURE


def test_a_large_picture_is_shrunk_as_by_the_stock_call() -> None:
    # Sides divided by 16, as released.
    pipeline = build_klein(resolutions=4)
    family = build_family(pipeline).told_pictures()
    pixels = torch.rand(1, 3, 1100, 1300, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = family.picture_fields(pipeline, pixels, (16, 68, 81))["image_latents"]
    seen = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["hidden_states"]), with_kwargs=True
    )
    call = {"prompt": ["x"], "height": 64, "width": 64, "num_inference_steps": 1, "max_sequence_length": TEXT_TOKENS}
    pipeline(**call, **family.picture_arguments(pixels), guidance_scale=1.0, output_type="latent")
    hook.remove()
    assert tuple(found.shape) == (1, 16, 1, 58, 69)
    stock = seen[0][:, 16:]
    # Of a picture of a million pixels, through layers that add up many of them.
    assert float((flatten_positions(found) - stock).abs().max() / stock.abs().max()) < 1e-3


class TestKlein(FamilyChecks):
    model = KLEIN


class TestDev(FamilyChecks):
    model = DEV


def test_the_grid_of_the_teacher_follows_the_size_and_the_steps() -> None:
    pipeline = build_klein()
    family = build_family(pipeline)
    # At 1,024 tokens mu is 1.98781 for 10 steps and 0.63 for 200, and on the line through both for others.
    few, many = 8.73809524e-05 * 1024 + 1.89833333, 0.00016927 * 1024 + 0.45666666
    for steps in (50, 4):
        expected = math.exp(few + (steps - 10) / 190 * (many - few))
        second = family.teacher_grid(pipeline, steps, (16, 32, 32))[1]
        even = 1 - 1 / steps
        assert second / (1 - second) * (1 - even) / even == pytest.approx(expected, rel=1e-5)


def test_an_export_of_klein_makes_one_call_at_any_guidance(tmp_path: Path) -> None:
    build_klein().save_pretrained(tmp_path / "model", safe_serialization=True)
    export_student(KLEIN, tmp_path / "model", tmp_path / "export", (1.0, 0.5), "ode")
    index = json.loads((tmp_path / "export" / "model_index.json").read_text(encoding="utf-8"))
    assert index["is_distilled"] is True


def test_dev_is_told_its_guidance_and_makes_no_second_call() -> None:
    teacher = Teacher(build_dev(), path="x", embedded_guidance=2.5)
    condition = teacher.encode(list(PROMPTS))
    assert condition.guidance is not None
    assert condition.guidance.tolist() == [2.5, 2.5]
    assert teacher.family.guidance_arguments(1.0) == {"guidance_scale": 2.5}
    with pytest.raises(ValueError, match="makes no second call"):
        teacher.family.guidance_arguments(2.0)
    x_t = noise_of(DEV.shape(teacher))
    other = dataclasses.replace(condition, guidance=torch.tensor([4.0, 2.5]))
    with torch.no_grad():
        here, there = (teacher.denoiser(x_t, torch.ones(2), told) for told in (condition, other))
    assert (here[0] - there[0]).abs().max() > 1e-4
    torch.testing.assert_close(here[1], there[1])


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"in_channels": 256, "out_channels": 128}, "takes 256 channels and gives 128"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "FLUX.2 needs a FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_klein())
    with pytest.raises(ValueError, match=message):
        require_flux2({**configs, component: {**configs[component], **changes}})
