"""Cosmos Predict 2.5 in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from fewstep.core.families.cosmos import CosmosFamily, require_cosmos, without_guardrail
from fewstep.core.families.table import build_family, configs_of, require_known_class
from tests.core.families.checks import FamilyChecks, TinyModel, export_student
from tests.tiny_networks import widen_weights
from tests.tiny_text import build_qwen_tokenizer, build_qwen_vl

TEXT_TOKENS, CHANNELS, WIDTH = 160, 4, 16
COSMOS_CHAT = "{% for message in messages %}<|im_start|>{{ message['content'][0]['text'][:40] }}<|im_end|>{% endfor %}"


def build_cosmos(*, seed: int = 0) -> Cosmos2_5_PredictBasePipeline:
    """Cosmos with two blocks; text of two layers side by side, projected."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_qwen_tokenizer()
        tokenizer.model_max_length = TEXT_TOKENS
        tokenizer.chat_template = COSMOS_CHAT
        transformer = CosmosTransformer3DModel(
            in_channels=CHANNELS + 1,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=24,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            extra_pos_embed_type=None,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=2 * WIDTH,
            encoder_hidden_states_channels=24,
        )
        widen_weights(transformer)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.2, -0.1, 0.4, 0.0],
            latents_std=[1.5, 0.7, 1.1, 0.9],
        ).eval()
        pipeline = Cosmos2_5_PredictBasePipeline(
            text_encoder=build_qwen_vl(tokenizer, width=WIDTH),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            **without_guardrail(),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_cosmos(folder: Path) -> None:
    """The model on disk, without the guardrail's stand-in."""
    pipeline = build_cosmos()
    pipeline.register_modules(safety_checker=None)
    pipeline.save_pretrained(folder, safe_serialization=True)


MODEL = TinyModel(
    build_cosmos,
    {"height": 32, "width": 48, "frames": 5},
    guidance=8.0,
    grids={},
    shift=5.0,
    parts=without_guardrail,
)


class TestCosmos(FamilyChecks):
    model = MODEL

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("model")
        write_cosmos(folder)
        return folder


def test_an_export_holds_no_stand_in_of_the_guardrail(tmp_path: Path) -> None:
    write_cosmos(tmp_path / "model")
    export_student(MODEL, tmp_path / "model", tmp_path / "export", (1.0, 0.5), "ode")
    index = json.loads((tmp_path / "export" / "model_index.json").read_text(encoding="utf-8"))
    assert index["safety_checker"] == [None, None]
    assert not (tmp_path / "export" / "safety_checker").exists()


def test_canonical_guidance_is_one_more_than_the_stock_scale() -> None:
    family = CosmosFamily(1000)
    assert family.guidance_arguments(8.0) == {"guidance_scale": 7.0}
    assert family.guidance_arguments(1.0) == {"guidance_scale": 1.0}
    with pytest.raises(ValueError, match="has none, 1, or more than 2"):
        family.guidance_arguments(1.5)


def test_the_teachers_grid_is_that_of_its_solver() -> None:
    pipeline = build_cosmos()
    pipeline.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, use_karras_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.01
    )
    times = build_family(pipeline).teacher_grid(pipeline, 36)
    assert len(times) == 36
    # 200 / 201, and 0.01 / 1.01.
    assert (times[0], times[-1]) == (pytest.approx(0.99502, abs=1e-5), pytest.approx(0.0099, abs=1e-5))


def test_what_is_no_teacher_is_refused() -> None:
    configs = configs_of(build_cosmos())
    with pytest.raises(ValueError, match="takes 4 channels and gives 4"):
        require_cosmos({**configs, "transformer": {**configs["transformer"], "in_channels": 4}})
    for name in ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"):
        with pytest.raises(ValueError, match="one step returns the noise"):
            require_known_class(name)
