"""PixArt-Sigma in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from fewstep.core.families.pixart import require_pixart
from fewstep.core.families.table import build_family, configs_of
from tests.core.families.checks import FamilyChecks, TinyModel
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import T5_WIDTH, build_t5, build_t5_tokenizer, build_vae

TEXT_TOKENS = 24
INDICES = {1: (999,), 2: (999, 499), 4: (999, 749, 499, 249)}


def linear_ddim() -> DDIMScheduler:
    """The linear table of PixArt and DiT, with DDIM in place of their own solvers."""
    return DDIMScheduler(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def build_pixart(*, seed: int = 0) -> PixArtSigmaPipeline:
    """PixArt-Sigma with two blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_t5_tokenizer()
        tokenizer.model_max_length = TEXT_TOKENS
        transformer = PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            num_attention_heads=3,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            caption_channels=T5_WIDTH,
            use_additional_conditions=False,
        )
        widen_weights(transformer)
        pipeline = PixArtSigmaPipeline(
            tokenizer=tokenizer,
            text_encoder=build_t5(tokenizer),
            vae=build_vae(scaling_factor=0.13025, shift_factor=None, quant_conv=True),
            transformer=transformer.eval(),
            scheduler=linear_ddim(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def uneven(indices: tuple[int, ...]) -> tuple[float, ...]:
    path = build_family(build_pixart()).flow_time
    return tuple(path(torch.tensor(indices, dtype=torch.float64)).tolist())


MODEL = TinyModel(
    build_pixart,
    {"height": 16, "width": 24},
    guidance=4.5,
    grids={"sde": uneven((999, 700, 120)), "ode": uneven((999, 650, 300))},
    lora=False,
    indices=INDICES,
)


class TestPixArt(FamilyChecks):
    model = MODEL


def test_canonical_times_of_the_usual_indices() -> None:
    assert uneven((999, 749, 499, 249)) == pytest.approx((0.9937, 0.9452, 0.7740, 0.4880), abs=5e-5)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"use_additional_conditions": True}, "use PixArt-Sigma"),
        ("scheduler", {"prediction_type": "v_prediction"}, "predicts eps"),
        ("scheduler", {"_class_name": "LCMScheduler"}, "few-step student"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_pixart())
    with pytest.raises(ValueError, match=message):
        require_pixart({**configs, component: {**configs[component], **changes}})
