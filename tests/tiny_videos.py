"""A tiny WanPipeline with random weights: the real classes in sizes that a CPU runs in milliseconds.

Videos have 9 frames of 32 x 32 pixels, latents [4, 3, 8, 8]. The same seed gives the same weights.
"""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tests.tiny_networks import widen_weights
from tests.tiny_pipelines import build_t5_tokenizer

VIDEO_FRAMES, VIDEO_SIDE = 9, 32
VIDEO_LATENTS = (4, 3, 8, 8)
LATENTS_MEAN, LATENTS_STD = [0.2, -0.1, 0.4, 0.0], [1.5, 0.7, 1.1, 0.9]
TEXT_WIDTH = 24


def build_umt5(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """Two layers of width 24."""
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ).eval()


def build_video_vae() -> AutoencoderKLWan:
    """Sides and time divided by four."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=VIDEO_LATENTS[0],
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def build_video_pipeline(
    *, shift: float = 3.0, expand_timesteps: bool = False, text_tokens: int = 512, seed: int = 0, blocks: int = 3
) -> WanPipeline:
    """Wan with 16 tokens per latent frame; `expand_timesteps` as Wan 2.2 TI2V has it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_t5_tokenizer()
        tokenizer.model_max_length = text_tokens
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=VIDEO_LATENTS[0],
            out_channels=VIDEO_LATENTS[0],
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=48,
            num_layers=blocks,
            rope_max_seq_len=64,
        )
        widen_weights(transformer)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=build_umt5(tokenizer),
            vae=build_video_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            transformer=transformer.eval(),
            expand_timesteps=expand_timesteps,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
