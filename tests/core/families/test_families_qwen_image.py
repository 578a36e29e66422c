"""Qwen-Image in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from fewstep.core.families.qwen_image import QwenImageFamily, require_qwen_image
from fewstep.core.families.table import build_family, configs_of
from tests.core.families.checks import FamilyChecks, TinyModel
from tests.tiny_networks import widen_weights
from tests.tiny_text import PICTURE_MARKS, build_qwen_processor, build_qwen_tokenizer, build_qwen_vl

# The scheduler of the release.
RELEASED = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def build_qwen_image(
    *, kind: type[Any] = QwenImagePipeline, halvings: int = 1, zero_cond_t: bool = False, seed: int = 0
) -> Any:
    """Qwen-Image with two blocks, latents of four channels, and pixels whose sides are halved so many times; models
    that edit have a processor of pictures, too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer(PICTURE_MARKS)
        parts: dict[str, Any] = {} if kind is QwenImagePipeline else {"processor": build_qwen_processor(tokenizer)}
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
        widen_weights(transformer)
        pipeline = kind(
            scheduler=FlowMatchEulerDiscreteScheduler(**RELEASED),
            vae=AutoencoderKLQwenImage(
                base_dim=4 if halvings == 1 else 2,
                z_dim=4,
                dim_mult=[1] * (halvings + 1),
                num_res_blocks=1,
                temperal_downsample=[False] * halvings,
                latents_mean=[0.2, -0.1, 0.4, 0.0],
                latents_std=[1.5, 0.7, 1.1, 0.9],
            ).eval(),
            text_encoder=build_qwen_vl(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            **parts,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL = TinyModel(build_qwen_image, {"height": 16, "width": 24}, guidance=4.0)


class TestQwenImage(FamilyChecks):
    model = MODEL


def test_guidance_keeps_the_length_of_each_patch() -> None:
    family = QwenImageFamily(1000)
    u, c = torch.randn(2, 3, 4, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    guided = family.combine(u, c, 4.0)
    plain = u + 4 * (c - u)
    for row in range(2):
        for column in range(3):
            patch = (..., slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            for sample in range(3):
                own, free = guided[sample][patch], plain[sample][patch]
                assert own.norm() == pytest.approx(c[sample][patch].norm().item(), rel=1e-12)
                torch.testing.assert_close(own * free.norm() / own.norm(), free)
    torch.testing.assert_close(family.combine(u, c, 1.0), c)
    nothing = torch.zeros_like(c)
    assert family.combine(nothing, nothing, 4.0).abs().max() == 0


def test_the_teachers_grid_ends_where_its_scheduler_says() -> None:
    pipeline = build_qwen_image()
    times = build_family(pipeline).teacher_grid(pipeline, 4, (4, 8, 12))
    assert times[0] == 1.0
    assert times[-1] == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"in_channels": 128}, "takes 128 channels and gives 16"),
        ("transformer", {"zero_cond_t": True}, "zero_cond_t"),
        ("scheduler", {"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_qwen_image())
    with pytest.raises(ValueError, match=message):
        require_qwen_image({**configs, component: {**configs[component], **changes}})
