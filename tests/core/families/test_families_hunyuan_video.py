"""HunyuanVideo in canonical coordinates, against the stock pipeline."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import CLIPTextModel, LlamaConfig, LlamaModel

from fewstep.core.families.hunyuan_video import require_hunyuan_video
from fewstep.core.families.table import configs_of
from fewstep.core.teacher import Teacher
from tests.core.families.checks import FamilyChecks, TinyModel, distance, noise_of, told
from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import CLIP_WIDTH, build_clip_tokenizer, clip_config
from tests.tiny_text import build_qwen_tokenizer


def template_tokens() -> tuple[str, ...]:
    """The stock template in as many pieces as the stock pipeline crops."""
    text, count = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0], DEFAULT_PROMPT_TEMPLATE["crop_start"]
    size = -(-len(text) // count)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    # The last pieces are cut again until there are as many.
    while len(pieces) < count:
        longest = max(range(len(pieces)), key=lambda place: len(pieces[place]))
        piece = pieces[longest]
        pieces[longest : longest + 1] = [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    return tuple(dict.fromkeys(pieces))


def build_hunyuan_video(*, guidance_embeds: bool = True, seed: int = 0) -> HunyuanVideoPipeline:
    """HunyuanVideo with one block of either kind and one refiner; sides divided by 8, time by 4."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip_tokenizer, tokenizer = build_clip_tokenizer(), build_qwen_tokenizer(extra=template_tokens())
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=16,
            pooled_projection_dim=CLIP_WIDTH,
            rope_axes_dim=(2, 4, 4),
            guidance_embeds=guidance_embeds,
        )
        widen_weights(transformer)
        llama = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
        pipeline = HunyuanVideoPipeline(
            text_encoder=LlamaModel(llama).eval(),
            tokenizer=tokenizer,
            transformer=transformer.eval(),
            vae=AutoencoderKLHunyuanVideo(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=4,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=CLIPTextModel(clip_config(clip_tokenizer)).eval(),
            tokenizer_2=clip_tokenizer,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


MODEL = TinyModel(build_hunyuan_video, {"height": 16, "width": 32, "frames": 9}, guidance=2.0, shift=7.0)


class TestHunyuanVideo(FamilyChecks):
    model = MODEL


def test_two_prompts_differ_behind_the_cropped_template() -> None:
    teacher = MODEL.teacher()
    condition = told(MODEL, teacher)
    assert condition.token_mask is not None
    assert condition.token_mask.sum(dim=1).tolist()[0] > condition.token_mask.sum(dim=1).tolist()[1] > 0
    assert distance(condition.text[:1], condition.text[1:]) > 0.1


def test_the_embedded_guidance_is_a_setting() -> None:
    teacher = Teacher(build_hunyuan_video(), path="x", embedded_guidance=2.0)
    assert teacher.family.guidance_arguments(1.0) == {"guidance_scale": 2.0}
    assert MODEL.teacher().family.guidance_arguments(1.0) == {"guidance_scale": 6.0}
    assert MODEL.teacher().family.guidance_arguments(3.0) == {"guidance_scale": 6.0, "true_cfg_scale": 3.0}
    usual = MODEL.teacher()
    x_t = noise_of(MODEL.shape(usual))
    with torch.no_grad():
        here, there = (one.denoiser(x_t, torch.ones(2), told(MODEL, one)) for one in (usual, teacher))
    assert distance(here, there) > 1e-3
    plain = TinyModel(lambda: build_hunyuan_video(guidance_embeds=False), MODEL.size).teacher()
    assert plain.family.guidance_arguments(1.0) == {"true_cfg_scale": 1.0}


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("transformer", {"image_condition_type": "latent_concat"}, "is told a picture"),
        ("transformer", {"in_channels": 33}, "takes 33 channels"),
        ("scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_what_is_no_teacher_is_refused_by_its_configs(component: str, changes: dict, message: str) -> None:
    configs = configs_of(build_hunyuan_video())
    with pytest.raises(ValueError, match=message):
        require_hunyuan_video({**configs, component: {**configs[component], **changes}})
