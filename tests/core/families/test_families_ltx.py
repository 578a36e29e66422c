"""LTX-Video in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from fewstep.core.families.ltx import require_ltx
from fewstep.core.families.table import configs_of
from tests.core.families.checks import FamilyChecks, TinyModel, noise_of
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import T5_WIDTH, build_t5, build_t5_tokenizer

TEXT_TOKENS = 24
# The scheduler of the release.
RELEASED = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def build_ltx(*, timestep_conditioning: bool = False, seed: int = 0) -> LTXPipeline:
    """LTX-Video with one block; sides divided by 4 and time by 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_t5_tokenizer()
        tokenizer.model_max_length = TEXT_TOKENS
        transformer = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=T5_WIDTH,
        )
        widen_weights(transformer)
        vae = AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False),
            decoder_spatio_temporal_scaling=(True, True, False),
            decoder_inject_noise=(False, False, False, False),
            upsample_residual=(False, False, False),
            upsample_factor=(1, 1, 1),
            patch_size=2,
            timestep_conditioning=timestep_conditioning,
        ).eval()
        generator = torch.Generator().manual_seed(1)
        statistics: dict[str, Any] = dict(vae.named_buffers(recurse=False))
        statistics["latents_mean"].copy_(0.3 * torch.randn(8, generator=generator))
        statistics["latents_std"].copy_(0.5 + torch.rand(8, generator=generator))
        pipeline = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**RELEASED),
            vae=vae,
            text_encoder=build_t5(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL = TinyModel(build_ltx, {"height": 32, "width": 64, "frames": 9}, guidance=3.0, grids={})


class TestLtx(FamilyChecks):
    model = MODEL


def test_an_autoencoder_that_denoises_is_decoded_as_by_the_stock_call() -> None:
    pipeline = build_ltx(timestep_conditioning=True)
    model = TinyModel(lambda: pipeline, MODEL.size)
    teacher = model.teacher()
    call = teacher.family.call_arguments(pipeline, **model.size)
    assert (call["decode_timestep"], call["decode_noise_scale"], call["frame_rate"]) == (0.05, 0.025, 25)
    latents = noise_of(model.shape(teacher), 1)
    with torch.no_grad():
        found = teacher.decode(latents)
        scale, shift = pipeline.vae.latents_std, pipeline.vae.latents_mean
        raw = latents * scale.view(1, -1, 1, 1, 1) + shift.view(1, -1, 1, 1, 1)
        noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(0))
        mixed = (1 - 0.025) * raw + 0.025 * noise
        expected = pipeline.vae.decode(mixed, torch.tensor([0.05]), return_dict=False)[0]
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"patch_size": 2}, "reads single positions"),
        ("transformer", {"in_channels": 16}, "takes 16 channels and gives 8"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "LTX-Video needs a FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_ltx())
    with pytest.raises(ValueError, match=message):
        require_ltx({**configs, component: {**configs[component], **changes}})


def test_frames_are_eight_k_plus_one_in_the_model_and_four_here() -> None:
    teacher = MODEL.teacher()
    with pytest.raises(ValueError, match="frames must be 4 k"):
        teacher.latent_shape(32, 32, frames=8)
    with pytest.raises(ValueError, match="multiple of 32"):
        teacher.latent_shape(48, 32, frames=9)
