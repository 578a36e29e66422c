"""CogVideoX in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from fewstep.core.families.cogvideox import require_cogvideox
from fewstep.core.families.table import build_family, configs_of
from tests.core.families.checks import FamilyChecks, TinyModel
from tests.core.families.test_families_pixart import INDICES
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import T5_WIDTH, build_t5, build_t5_tokenizer

TEXT_TOKENS = 16


def build_cogvideox(*, rotary: bool = True, snr_shift_scale: float = 1.0, seed: int = 0) -> CogVideoXPipeline:
    """CogVideoX with one block; with rotary positions and no shift of the table as 5b, without and 3 as 2b."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_t5_tokenizer()
        tokenizer.model_max_length = TEXT_TOKENS
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=T5_WIDTH,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=TEXT_TOKENS,
            use_rotary_positional_embeddings=rotary,
        )
        widen_weights(transformer)
        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=build_t5(tokenizer),
            vae=AutoencoderKLCogVideoX(
                block_out_channels=(8, 8, 8, 8),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=4,
                scaling_factor=0.7,
            ).eval(),
            transformer=transformer.eval(),
            scheduler=CogVideoXDDIMScheduler(
                snr_shift_scale=snr_shift_scale,
                timestep_spacing="trailing",
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
            ),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SIZE = {"height": 32, "width": 32, "frames": 9}
LARGE = TinyModel(build_cogvideox, SIZE, guidance=6.0, grids={}, indices=INDICES)
SMALL = TinyModel(
    lambda: build_cogvideox(rotary=False, snr_shift_scale=3.0), SIZE, guidance=6.0, grids={}, indices=INDICES
)


class Test5b(FamilyChecks):
    model = LARGE


class Test2b(FamilyChecks):
    model = SMALL


@pytest.mark.parametrize(("scale", "expected"), [(1.0, (0.8437, 0.6387, 0.4210)), (3.0, (0.9047, 0.7543, 0.5552))])
def test_canonical_times_of_the_usual_indices(scale: float, expected: tuple[float, ...]) -> None:
    family = build_family(build_cogvideox(snr_shift_scale=scale))
    times = family.flow_time(torch.tensor([999.0, 749.0, 499.0, 249.0], dtype=torch.float64)).tolist()
    assert times[0] == pytest.approx(1.0, abs=1e-7)
    assert times[1:] == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"patch_size_t": 2}, "CogVideoX 1.5"),
        ("transformer", {"in_channels": 8}, "takes 8 channels and gives 4"),
        ("scheduler", {"prediction_type": "epsilon"}, "predicts v"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_cogvideox())
    with pytest.raises(ValueError, match=message):
        require_cogvideox({**configs, component: {**configs[component], **changes}})
