"""Wan that is told its first frame, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from fewstep.core.families.table import configs_of
from fewstep.core.families.wan_image import require_wan_image
from fewstep.core.settings import ModelSource
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from tests.core.families.checks import FamilyChecks, TinyModel, noise_of, told
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import build_t5_tokenizer
from tests.tiny_videos import TEXT_WIDTH, build_umt5

CHANNELS, CLIP_WIDTH = 4, 4


def build_vae(*, channels: int = CHANNELS, factor: int = 4) -> AutoencoderKLWan:
    """Sides divided by `factor`, time by four."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.2, -0.1, 0.4, 0.0],
        latents_std=[1.5, 0.7, 1.1, 0.9],
        scale_factor_temporal=4,
        scale_factor_spatial=factor,
    ).eval()


def build_transformer(channels: int, *, image_dim: int | None = None) -> WanTransformer3DModel:
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 24,
    )
    widen_weights(network)
    return network.eval()


def build_wan_image(*, clip: bool = True, expand_timesteps: bool = False, seed: int = 0) -> WanImageToVideoPipeline:
    """Wan 2.1 image-to-video; without CLIP as an expert of 2.2, with `expand_timesteps` the image mode of TI2V-5B."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_t5_tokenizer()
        vision = CLIPVisionConfig(
            hidden_size=CLIP_WIDTH,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        channels = CHANNELS if expand_timesteps else 2 * CHANNELS + 4
        pipeline = WanImageToVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=build_umt5(tokenizer),
            vae=build_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16) if clip else None,
            image_encoder=CLIPVisionModel(vision).eval() if clip else None,
            transformer=build_transformer(channels, image_dim=CLIP_WIDTH if clip else None),
            expand_timesteps=expand_timesteps,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SIZE = {"height": 32, "width": 16, "frames": 9}
MODEL = TinyModel(build_wan_image, SIZE, guidance=5.0, grids={}, shift=5.0)


class TestWan21(FamilyChecks):
    model = MODEL


TI2V = TinyModel(lambda: build_wan_image(clip=False, expand_timesteps=True), SIZE, guidance=5.0, grids={})


class TestTi2v(FamilyChecks):
    model = TI2V


def test_a_student_of_the_image_mode_ends_with_the_picture_whatever_it_learnt() -> None:
    model = TestTi2v.model
    teacher = model.teacher()
    condition, noise = told(model, teacher), noise_of(model.shape(teacher))
    assert condition.image_latents is not None
    student = Student(teacher.denoiser, (1.0, 0.6), "sde")
    sample = student.sample(noise, condition, [noise_of(model.shape(teacher), seed=3)])
    torch.testing.assert_close(sample[:, :, :1], condition.image_latents, rtol=0, atol=2e-6)
    x_t, t = noise_of(model.shape(teacher), seed=4), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        x0 = teacher.denoiser.x0(x_t, t, condition)
    torch.testing.assert_close(x0[:, :, :1], condition.image_latents, rtol=0, atol=2e-6)


def test_the_picture_is_told_to_both_sides_of_guidance() -> None:
    teacher = MODEL.teacher()
    condition = told(MODEL, teacher)
    x_t, t = noise_of(MODEL.shape(teacher)), torch.tensor([0.3, 0.9])
    null = teacher.null_condition.expand(2).of_same_samples(condition)
    with torch.no_grad():
        u, c = teacher.denoiser(x_t, t, null), teacher.denoiser(x_t, t, condition)
        found = teacher.velocity(x_t, t, condition, 5.0)
    torch.testing.assert_close(found, u + 5 * (c - u), rtol=0, atol=1e-5)
    dropped = condition.where(torch.tensor([True, False]), teacher.null_condition)
    assert condition.image_latents is not None
    assert dropped.image_latents is not None
    assert torch.equal(dropped.image_latents, condition.image_latents)


def test_first_frames_of_real_videos_are_told() -> None:
    teacher = MODEL.teacher()
    videos = noise_of(MODEL.shape(teacher))
    condition = teacher.with_first_frames(teacher.encode(list(MODEL.prompts)), videos)
    with torch.no_grad():
        first = teacher.decode(videos[:, :, :1])[:, :, 0]
    expected = teacher.with_pictures(teacher.encode(list(MODEL.prompts)), first, frames=SIZE["frames"])
    for name, tensor in expected.present().items():
        torch.testing.assert_close(condition.present()[name], tensor)
    ti2v = TestTi2v.model.teacher()
    own = ti2v.with_first_frames(ti2v.encode(["x", "y"]), videos)
    assert own.image_latents is not None
    assert torch.equal(own.image_latents, videos[:, :, :1])


def test_the_image_mode_is_a_class_of_its_own_on_the_same_files(tmp_path: Path) -> None:
    image = build_wan_image(clip=False, expand_timesteps=True)
    parts: dict[str, Any] = {name: getattr(image, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    WanPipeline(**parts, transformer=image.transformer, expand_timesteps=True).save_pretrained(tmp_path / "model")
    plain = Teacher.load(tmp_path / "model")
    assert plain.family.name == "wan"
    teacher = Teacher.load(ModelSource(path=str(tmp_path / "model"), pipeline="WanImageToVideoPipeline"))
    assert type(teacher.pipeline) is WanImageToVideoPipeline
    assert teacher.family.name == "wan_image"
    with pytest.raises(ValueError, match="no family for the pipeline class os"):
        Teacher.load(ModelSource(path=str(tmp_path / "model"), pipeline="os"))


def test_what_is_no_teacher_is_refused_by_its_configs() -> None:
    configs = configs_of(build_wan_image())
    with pytest.raises(ValueError, match="takes 4 channels and gives 4"):
        require_wan_image({**configs, "transformer": {**configs["transformer"], "in_channels": 4}})
    with pytest.raises(ValueError, match="pos_embed_seq_len 514"):
        require_wan_image({**configs, "transformer": {**configs["transformer"], "pos_embed_seq_len": 514}})
    teacher = MODEL.teacher()
    with pytest.raises(ValueError, match="encode with pictures"):
        teacher.denoiser(noise_of(MODEL.shape(teacher)), torch.ones(2), teacher.encode(["x", "y"]))
