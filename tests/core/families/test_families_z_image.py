"""Z-Image in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from fewstep.core.families.table import configs_of
from fewstep.core.families.z_image import ZImageFamily, require_z_image
from fewstep.core.grids import step_grid
from tests.core.families.checks import FamilyChecks, TinyModel, export_student
from tests.core.families.test_families_flux import build_packed_vae
from tests.tiny_networks import widen_weights
from tests.tiny_text import build_qwen3, build_qwen_tokenizer


def build_z_image(*, seed: int = 0) -> ZImagePipeline:
    """Z-Image with two layers and one refiner of either kind."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        )
        widen_weights(transformer)
        for parameter in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(parameter)
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=build_packed_vae(),
            text_encoder=build_qwen3(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL = TinyModel(build_z_image, {"height": 16, "width": 24}, guidance=4.0)


class TestZImage(FamilyChecks):
    model = MODEL


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "shift"), [(3, 1.0), (3, 3.0), (5, 3.0), (6, 1.0)])
def test_an_export_of_times_that_fp32_rounds_is_no_other_student(tmp_path: Path, steps: int, shift: float) -> None:
    """The network turns the last digit of 1 - t into 5e-5 to 2e-4 of a latent, more than an export may be off."""
    MODEL.build().save_pretrained(tmp_path / "model")
    record = export_student(MODEL, tmp_path / "model", tmp_path / "export", step_grid(steps, shift=shift), "ode")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-6


def test_canonical_guidance_is_one_more_than_the_stock_scale() -> None:
    family = ZImageFamily(1000)
    assert family.guidance_arguments(4.0) == {"guidance_scale": 3.0}
    # The stock call makes a second call for every scale above 0.
    assert family.guidance_arguments(1.0) == {"guidance_scale": 0.0}


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"siglip_feat_dim": 8}, "an Omni model"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "Z-Image needs a FlowMatchEulerDiscreteScheduler"),
        ("vae", {"scaling_factor": None}, "scaling_factor is None"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_z_image())
    with pytest.raises(ValueError, match=message):
        require_z_image({**configs, component: {**configs[component], **changes}})
