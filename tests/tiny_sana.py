"""Tiny SANA pipelines with random weights: the real classes, pictures of 32 x 32 pixels, latents [8, 4, 4]."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
)

from fewstep.core.families.sana_control import with_controlnet
from fewstep.embedded.digits.sana_teacher import TEXT_WIDTH, build_gemma, build_gemma_tokenizer
from tests.tiny_networks import widen_weights

LATENT_SHAPE = (8, 4, 4)
PIXELS = 32


def build_autoencoder() -> AutoencoderDC:
    """Eight times smaller sides, eight channels."""
    widths, plain = (8, 8, 16, 16), ((), (), (), ())
    return AutoencoderDC(
        latent_channels=LATENT_SHAPE[0],
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=plain,
        decoder_qkv_multiscales=plain,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=0.41407,
    ).eval()


def build_transformer(*, layers: int = 3, learnt_variance: bool = False, **config: Any) -> SanaTransformer2DModel:
    """Blocks of width 16; attention far from uniform."""
    transformer = SanaTransformer2DModel(
        in_channels=LATENT_SHAPE[0],
        out_channels=(2 if learnt_variance else 1) * LATENT_SHAPE[0],
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
        sample_size=LATENT_SHAPE[1],
        **config,
    )
    widen_weights(transformer)
    return transformer.eval()


def build_sana(*, shift: float = 3.0, dense: bool = False, seed: int = 0, **config: Any) -> SanaPipeline:
    """SANA with a Gemma2 of two layers; `dense` gives the network t in [0, 1] and norms of queries and keys."""
    if dense:
        config = {"timestep_scale": 0.001, "qk_norm": "rms_norm_across_heads", **config}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_gemma_tokenizer()
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=build_gemma(tokenizer, seed=seed),
            vae=build_autoencoder(),
            transformer=build_transformer(**config),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_controlled_sana(*, seed: int = 0) -> SanaControlNetPipeline:
    """SANA with dense time and a ControlNet of two blocks that has something to say."""
    pipeline = with_controlnet(build_sana(dense=True, seed=seed), layers=2)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in (pipeline.controlnet.input_block, pipeline.controlnet.controlnet_blocks):
            for parameter in module.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return pipeline
