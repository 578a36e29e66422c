"""FLUX.1 dev and schnell in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel

from fewstep.core.export.record import StudentReport
from fewstep.core.families.flux import require_flux
from fewstep.core.families.table import build_family, configs_of
from fewstep.core.teacher import Teacher
from tests.core.families.checks import FamilyChecks, TinyModel, distance, noise_of, stock_latents
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import CLIP_WIDTH, T5_WIDTH, build_clip_tokenizer, build_t5, build_t5_tokenizer, clip_config

TEXT_TOKENS = 24


def build_packed_vae() -> AutoencoderKL:
    """Two resolutions, four latent channels, with FLUX.1's scale and shift."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def build_flux(*, dev: bool = True, kind: type[Any] = FluxPipeline, seed: int = 0) -> Any:
    """FLUX.1 with one block of either kind; a scheduler that shifts by the size for dev, as released."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
        t5_tokenizer.model_max_length = TEXT_TOKENS
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=dev,
            axes_dims_rope=(4, 4, 8),
        )
        widen_weights(transformer)
        pipeline = kind(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
            vae=build_packed_vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=build_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
            transformer=transformer.eval(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL = TinyModel(build_flux, {"height": 16, "width": 24})


class TestDev(FamilyChecks):
    model = MODEL


def test_schnell_is_told_no_guidance() -> None:
    model = dataclasses.replace(MODEL, build=lambda: build_flux(dev=False), guidance=1.0)
    teacher = model.teacher()
    noise = noise_of(model.shape(teacher))
    condition = teacher.encode(list(model.prompts))
    assert condition.guidance is None
    ours = teacher.sample(noise, condition, steps=3, guidance=1.0)
    assert distance(ours, stock_latents(model, teacher, noise, steps=3, guidance=1.0)) < 1e-4
    with pytest.raises(ValueError, match="have no embedding of it"):
        Teacher(model.build(), path="x", embedded_guidance=2.0)


def test_the_embedded_guidance_is_told_by_teacher_student_and_stock_call() -> None:
    pipeline = build_flux()
    usual, other = Teacher(pipeline, path="x"), Teacher(pipeline, path="x", embedded_guidance=1.5)
    assert usual.family.guidance_arguments(1.0) == {"guidance_scale": 3.5}
    assert other.family.guidance_arguments(1.0) == {"guidance_scale": 1.5}
    assert other.null_condition.guidance is not None
    assert other.null_condition.guidance.tolist() == [1.5]
    noise = noise_of(MODEL.shape(other))
    found = [one.sample(noise, one.encode(list(MODEL.prompts)), steps=2, guidance=2.0) for one in (usual, other)]
    stock = [stock_latents(MODEL, one, noise, steps=2, guidance=2.0) for one in (usual, other)]
    assert max(map(distance, found, stock)) < 1e-4
    assert distance(*found) > 1e-3


def test_the_grid_of_the_teacher_follows_the_size() -> None:
    pipeline = build_flux()
    family = build_family(pipeline)
    small, large = (family.teacher_grid(pipeline, 2, (4, side, side)) for side in (32, 128))
    # mu = 0.5 at 256 tokens and 1.15 at 4,096, and sigma = e^mu s / (1 + (e^mu - 1) s) at s = 1/2.
    expected = [torch.sigmoid(torch.tensor(mu)).item() for mu in (0.5, 1.15)]
    assert [small[1], large[1]] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"in_channels": 384, "out_channels": 64}, "takes 384 channels and gives 64"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "FLUX.1 needs a FlowMatchEulerDiscreteScheduler"),
        ("scheduler", {"stochastic_sampling": True}, "stochastic_sampling"),
        ("vae", {"scaling_factor": 0.0}, "scaling_factor is 0.0"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_flux())
    with pytest.raises(ValueError, match=message):
        require_flux({**configs, component: {**configs[component], **changes}})


def test_sizes_that_no_patches_cover_are_refused() -> None:
    teacher = MODEL.teacher()
    with pytest.raises(ValueError, match="multiple of 4 pixels"):
        teacher.latent_shape(18, 16)
    with pytest.raises(ValueError, match="frames is 5"):
        teacher.latent_shape(16, 16, frames=5)
    condition = teacher.encode(["x"])
    with pytest.raises(ValueError, match="even height and width"):
        teacher.denoiser(torch.zeros(1, 4, 3, 4), torch.ones(1), condition)
    bare = dataclasses.replace(condition, guidance=None)
    with pytest.raises(ValueError, match="guidance for dev alone"):
        teacher.denoiser(torch.zeros(1, 4, 4, 4), torch.ones(1), bare)
    assert StudentReport("dmd", "x", 1.0, 1, True).guidance == 1.0
