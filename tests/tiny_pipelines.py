"""Tiny diffusers pipelines with random weights: the real classes in sizes that a CPU runs in milliseconds.

Pictures are 16 x 16 pixels and latents [4, 8, 8]. The same seed gives the same weights.
"""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_WIDTH = 16
T5_WIDTH = 40
LATENT_SHAPE = (4, 8, 8)
PIXELS = 16


def build_clip_tokenizer() -> CLIPTokenizer:
    """One token per letter and digit, 77 tokens long."""
    letters = string.ascii_lowercase + string.digits
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def build_t5_tokenizer() -> T5Tokenizer:
    """One token per letter and digit, as a unigram model."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(letter, -3.0) for letter in string.ascii_lowercase + string.digits]
    return T5Tokenizer(vocab=specials + letters, extra_ids=0, model_max_length=512)


def clip_config(tokenizer: CLIPTokenizer, *, activation: str = "quick_gelu") -> CLIPTextConfig:
    """Two layers of width 16."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=CLIP_WIDTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers of width 40, wider than the two CLIP encoders together."""
    config = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def build_vae(*, scaling_factor: float, shift_factor: float | None, quant_conv: bool) -> AutoencoderKL:
    """Two resolutions, four latent channels."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    ).eval()


def build_sd3(*, with_t5: bool = False, shift: float = 3.0, sd35: bool = False, seed: int = 0):
    """Stable Diffusion 3 with three blocks; `sd35` adds query and key norms and a second attention in the first."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_clip_tokenizer()
        t5_tokenizer = build_t5_tokenizer() if with_t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SHAPE[1],
            patch_size=2,
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=16,
            dual_attention_layers=(0,) if sd35 else (),
            qk_norm="rms_norm" if sd35 else None,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=build_vae(scaling_factor=1.5305, shift_factor=0.0609, quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, activation="gelu")).eval(),
            tokenizer_2=build_clip_tokenizer(),
            text_encoder_3=build_t5(t5_tokenizer) if t5_tokenizer is not None else None,
            tokenizer_3=t5_tokenizer,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_ddim(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise table with trailing timesteps, so that every run starts at timestep 999."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def build_sd15(*, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 with two resolutions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=LATENT_SHAPE[1],
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=CLIP_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        pipeline = StableDiffusionPipeline(
            vae=build_vae(scaling_factor=0.18215, shift_factor=None, quant_conv=True),
            text_encoder=CLIPTextModel(clip_config(tokenizer)).eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=build_ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_sdxl(*, prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with two resolutions: pooled text and size micro-conditioning."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=LATENT_SHAPE[1],
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=2 * CLIP_WIDTH,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + CLIP_WIDTH,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=build_vae(scaling_factor=0.13025, shift_factor=None, quant_conv=True),
            text_encoder=CLIPTextModel(clip_config(tokenizer)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, activation="gelu")).eval(),
            tokenizer=tokenizer,
            tokenizer_2=build_clip_tokenizer(),
            unet=unet.eval(),
            scheduler=build_ddim(prediction_type),
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline, directory: Path) -> Path:
    """Write the pipeline as safetensors into `directory` and return it."""
    pipeline.save_pretrained(directory, safe_serialization=True)
    return directory
