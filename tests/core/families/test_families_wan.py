"""Wan in canonical coordinates against the stock transformer, pipeline and schedulers."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.core.families.wan import WanFamily, latent_frames
from fewstep.core.networks.lora import add_lora
from fewstep.core.teacher import Teacher
from tests.tiny_pipelines import build_sd3
from tests.tiny_videos import (
    LATENTS_MEAN,
    LATENTS_STD,
    TEXT_WIDTH,
    VIDEO_FRAMES,
    VIDEO_LATENTS,
    VIDEO_SIDE,
    build_video_pipeline,
)

PROMPTS = ["a red cat", "dog 12"]
FRAME_TOKENS = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stock_video(pipeline: Any, noise: Tensor, *, steps: int, guidance: float, output_type: str = "latent") -> Tensor:
    return pipeline(
        PROMPTS,
        height=VIDEO_SIDE,
        width=VIDEO_SIDE,
        num_frames=VIDEO_FRAMES,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type=output_type,
    ).frames


def test_velocity_is_the_transformer_output_at_1000_t() -> None:
    pipeline: Any = build_video_pipeline()
    family = build_family(pipeline)
    x_t, t = normal(2, *VIDEO_LATENTS), torch.tensor([0.25, 0.9])
    condition = family.encode_prompts(pipeline, PROMPTS)
    velocity = Denoiser(pipeline.transformer, family)(x_t, t, condition)
    expected = pipeline.transformer(x_t, 1000 * t, condition.text, return_dict=False)[0]
    assert torch.equal(velocity, expected)
    assert velocity.shape == (2, *VIDEO_LATENTS)


def test_time_per_frame_is_told_per_token() -> None:
    pipeline: Any = build_video_pipeline()
    denoiser = Denoiser(pipeline.transformer, build_family(pipeline))
    x_t, condition = normal(2, *VIDEO_LATENTS), Condition(normal(2, 5, TEXT_WIDTH, seed=1))
    t = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 0.9]])
    tokens = (1000 * t).repeat_interleave(FRAME_TOKENS, dim=1)
    assert tokens.shape == (2, 48)
    expected = pipeline.transformer(x_t, tokens, condition.text, return_dict=False)[0]
    assert torch.equal(denoiser(x_t, t, condition), expected)
    shared = torch.tensor([0.3, 0.8])
    same = denoiser(x_t, shared[:, None].expand(-1, 3), condition)
    assert (same - denoiser(x_t, shared, condition)).abs().max() < 2e-6
    assert (same - denoiser(x_t, t, condition)).abs().max() > 1e-2


@pytest.mark.parametrize("expand_timesteps", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_teacher_sample_equals_the_stock_pipeline(expand_timesteps: bool, guidance: float) -> None:
    pipeline = build_video_pipeline(expand_timesteps=expand_timesteps)
    noise = normal(2, *VIDEO_LATENTS)
    expected = stock_video(pipeline, noise, steps=4, guidance=guidance)
    teacher = Teacher(pipeline, path="tiny")
    latents = teacher.sample(noise, teacher.encode(PROMPTS), steps=4, guidance=guidance)
    assert (latents - expected).abs().max() < 2e-5
    assert expected.std() > 0.1


def test_network_trained_with_time_per_token_is_told_so() -> None:
    pipeline: Any = build_video_pipeline(expand_timesteps=True)
    family = build_family(pipeline)
    seen = []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, positional, named: seen.append(tuple(named["timestep"].shape)), with_kwargs=True
    )
    denoiser = Denoiser(pipeline.transformer, family)
    denoiser(normal(2, *VIDEO_LATENTS), torch.tensor([0.5, 0.6]), family.encode_prompts(pipeline, PROMPTS))
    assert seen == [(2, 48)]


def test_prompts_are_encoded_as_in_the_stock_pipeline() -> None:
    pipeline: Any = build_video_pipeline()
    family = build_family(pipeline)
    tokens, null = pipeline.encode_prompt(PROMPTS, None, True, max_sequence_length=512)
    assert (family.encode_prompts(pipeline, PROMPTS).text - tokens).abs().max() < 1e-5
    assert (family.encode_null(pipeline).text - null[:1]).abs().max() < 1e-5
    assert tokens.shape == (2, 512, TEXT_WIDTH)
    assert tokens[:, 12:].abs().max() == 0.0


def test_short_tokenizer_shortens_the_text() -> None:
    pipeline: Any = build_video_pipeline(text_tokens=16)
    tokens = build_family(pipeline).encode_prompts(pipeline, PROMPTS).text
    expected, _ = pipeline.encode_prompt(PROMPTS, None, False, max_sequence_length=16)
    assert tokens.shape == (2, 16, TEXT_WIDTH)
    assert (tokens - expected).abs().max() < 1e-5


def test_decoding_equals_the_stock_pipeline() -> None:
    pipeline = build_video_pipeline()
    family = build_family(pipeline)
    noise = normal(2, *VIDEO_LATENTS)
    latents = stock_video(pipeline, noise, steps=1, guidance=1.0)
    expected = stock_video(pipeline, noise, steps=1, guidance=1.0, output_type="pt").transpose(1, 2)
    pixels = family.decode_latents(pipeline, latents)
    assert pixels.shape == (2, 3, VIDEO_FRAMES, VIDEO_SIDE, VIDEO_SIDE)
    assert (pixels - expected).abs().max() < 1e-5
    assert pixels.std() > 1e-3


def test_encoding_standardises() -> None:
    pipeline: Any = build_video_pipeline()
    family = build_family(pipeline)
    pixels = torch.rand(2, 3, VIDEO_FRAMES, VIDEO_SIDE, VIDEO_SIDE, generator=torch.Generator().manual_seed(0))
    posterior = pipeline.vae.encode(pixels * 2 - 1).latent_dist
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENTS_MEAN, LATENTS_STD))
    latents = family.encode_pixels(pipeline, pixels)
    assert latents.shape == (2, *VIDEO_LATENTS)
    assert (latents - (posterior.mean - mean) / std).abs().max() < 1e-6
    drawn = family.encode_pixels(pipeline, pixels, torch.Generator().manual_seed(3))
    expected = posterior.sample(torch.Generator().manual_seed(3))
    assert (drawn - (expected - mean) / std).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"frames must be 4 k \+ 1 \(1, 5, 9, ...\), got 8"):
        family.encode_pixels(pipeline, pixels[:, :, :8])
    with pytest.raises(ValueError, match=r"pixels must be \[B, 3, F, H, W\], got shape \(2, 3, 32, 32\)"):
        family.encode_pixels(pipeline, pixels[:, :, 0])


@given(st.integers(0, 500), st.sampled_from([1, 2, 4, 8]))
def test_latent_frames_invert_pixel_frames(k: int, factor: int) -> None:
    assert latent_frames(factor * k + 1, factor=factor) == k + 1


def test_shapes_follow_the_stock_defaults() -> None:
    pipeline = build_video_pipeline()
    teacher = Teacher(pipeline, path="tiny")
    assert teacher.family.makes_videos
    assert not build_family(build_sd3()).makes_videos
    assert teacher.latent_shape(32, 48, frames=9) == (4, 3, 8, 12)
    assert teacher.latent_shape() == (4, 21, 120, 208)
    with pytest.raises(ValueError, match="height must be a positive multiple of 16 pixels for this model, got 24"):
        teacher.latent_shape(24, 32, frames=9)
    with pytest.raises(ValueError, match="got 10"):
        teacher.latent_shape(32, 32, frames=10)
    with pytest.raises(ValueError, match="frames is 9, and a teacher of the family sd3 makes pictures"):
        Teacher(build_sd3(), path="tiny").latent_shape(16, 16, frames=9)


def test_a_call_is_told_size_frames_and_length_of_the_text() -> None:
    pipeline = build_video_pipeline(text_tokens=16)
    assert build_family(pipeline).call_arguments(pipeline, frames=9, height=32, width=48) == {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "max_sequence_length": 16,
    }
    stock = {"height": 480, "width": 832, "num_frames": 81, "max_sequence_length": 512}
    wide = build_video_pipeline()
    assert build_family(wide).call_arguments(wide) == stock
    pictures = build_sd3()
    assert build_family(pictures).call_arguments(pictures, height=8) == {"height": 8}
    with pytest.raises(ValueError, match="frames is 9, and a teacher of the family sd3 makes pictures"):
        build_family(pictures).call_arguments(pictures, frames=9)
    with pytest.raises(ValueError, match=r"frames must be 4 k \+ 1 .* got 10"):
        build_family(pipeline).call_arguments(pipeline, frames=10)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_grid_is_the_schedulers(shift: float) -> None:
    pipeline = build_video_pipeline(shift=shift)
    times = build_family(pipeline).teacher_grid(pipeline, 5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(5)
    sigmas: Any = scheduler.sigmas
    assert times == tuple(sigmas[:-1].tolist())
    assert times[0] == 1.0


def test_unipc_gives_its_own_times() -> None:
    pipeline: Any = build_video_pipeline()
    pipeline.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", solver_order=2
    )
    times = build_family(pipeline).teacher_grid(pipeline, 8)
    pipeline.scheduler.set_timesteps(8)
    assert len(times) == 8
    assert [1000 * t for t in times] == pytest.approx(pipeline.scheduler.timesteps.tolist(), abs=1.0)


def test_other_schedulers_are_refused() -> None:
    pipeline: Any = build_video_pipeline()
    for scheduler, name in ((DDIMScheduler(), "DDIMScheduler"), (UniPCMultistepScheduler(), "UniPCMultistepScheduler")):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"this pipeline has {name}"):
            build_family(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        build_family(pipeline).teacher_grid(pipeline, 4)


def test_two_networks_are_refused() -> None:
    pipeline: Any = build_video_pipeline()
    pipeline.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match="two switch there"):
        Teacher(pipeline, path="tiny")


def test_sizes_that_do_not_fit_are_refused() -> None:
    pipeline: Any = build_video_pipeline()
    denoiser = Denoiser(pipeline.transformer, build_family(pipeline))
    condition = Condition(torch.zeros(1, 5, TEXT_WIDTH))
    with pytest.raises(ValueError, match=r"multiples of its patches \(1, 2, 2\), got shape \(1, 4, 3, 7, 8\)"):
        denoiser(torch.zeros(1, 4, 3, 7, 8), torch.ones(1), condition)
    with pytest.raises(ValueError, match=r"time must be \[B\], or \[B, 3\]"):
        denoiser(torch.zeros(1, 4, 3, 8, 8), torch.ones(1, 2), condition)


def test_features_and_adapters() -> None:
    pipeline: Any = build_video_pipeline()
    family = WanFamily.from_pipeline(pipeline)
    denoiser = Denoiser(pipeline.transformer, family)
    condition = family.encode_prompts(pipeline, PROMPTS)
    velocity, features = denoiser.velocity_and_features(
        normal(2, *VIDEO_LATENTS), torch.tensor([0.5, 0.5]), condition, [0, 2]
    )
    assert velocity.shape == (2, *VIDEO_LATENTS)
    assert [tuple(feature.shape) for feature in features] == [(2, 24, 48)] * 2
    assert family.feature_channels(pipeline.transformer, None) == [24]
    with pytest.raises(ValueError, match=r"blocks must be distinct numbers from 0 to 2, got \[3\]"):
        family.feature_modules(pipeline.transformer, [3])
    add_lora(pipeline.transformer, rank=2, alpha=2, targets=family.lora_targets, seed=0)
    adapters = [name for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name]
    # Four projections of each of two attentions, two layers of the feed-forward part, three blocks.
    assert len(adapters) == 3 * (2 * 4 + 2)
