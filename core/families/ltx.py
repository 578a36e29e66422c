"""LTX-Video: transformers over single positions of a strongly compressed video latent (arXiv:2501.00103).

Legend: B batch, F latent frames, N text tokens, D width of a token; latents [B, 128, F, h, w]; pixels
[B, 3, 8 (F - 1) + 1, 32 h, 32 w] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size
from fewstep.core.families.parts.flow import require_flow_scheduler, require_same_channels, shift_of_tokens
from fewstep.core.families.parts.latents import (
    flatten_positions,
    latent_frames,
    unflatten_positions,
    vae_decode,
    vae_encode,
)

# What the stock call makes when it is told nothing.
STOCK_SIZE, STOCK_FRAMES, FRAME_RATE, TEXT_TOKENS = (512, 704), 161, 25, 128
# Autoencoders from 0.9.1 on end the denoising themselves, from this time and share of noise (their model cards).
DECODE_TIME, DECODE_NOISE, DECODE_SEED = 0.05, 0.025, 0


@dataclass(frozen=True)
class LtxFamily(Family):
    """LTX-Video in canonical coordinates: the network's output is the velocity of flattened latents.

    Positions are told in seconds: the frame rate, the stock call's own, is part of what the student learns, and its
    stock call names it.

    Attributes:
        time_scale: the network's time at t = 1, the scheduler's `num_train_timesteps`.
        text_tokens: length of the text; its padding is masked.
        temporal, spatial: pixel frames and pixels that a latent stands for.
    """

    time_scale: float
    text_tokens: int
    temporal: int
    spatial: int
    name: ClassVar[str] = "ltx"
    makes_videos: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @staticmethod
    def from_pipeline(pipeline: LTXPipeline) -> LtxFamily:
        """The family of a pipeline that `require_ltx` lets through."""
        return LtxFamily(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            text_tokens=min(TEXT_TOKENS, pipeline.tokenizer.model_max_length),
            temporal=pipeline.vae_temporal_compression_ratio,
            spatial=pipeline.vae_spatial_compression_ratio,
        )

    def velocity(self, network: LTXVideoTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time `time_scale` t. Raises ValueError for a condition of another family."""
        mask = condition.token_mask
        if mask is None or x_t.ndim != 5:
            raise ValueError(f"LTX takes latents [B, C, F, h, w] and a masked text, got {tuple(x_t.shape)}")
        dtype, (frames, height, width) = network_dtype(network), x_t.shape[2:]
        output = network(
            hidden_states=flatten_positions(x_t).to(dtype),
            encoder_hidden_states=condition.text.to(dtype),
            timestep=t.expand(len(x_t)) * self.time_scale,
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.temporal / FRAME_RATE, self.spatial, self.spatial),
            return_dict=False,
        )[0]
        return unflatten_positions(output, (frames, height, width)).to(x_t.dtype)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: LTXPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, text_tokens, D] with their mask; LTX is not told the size."""
        tokens, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return Condition(tokens, token_mask=mask)

    def decode_latents(self, pipeline: LTXPipeline, latents: Tensor) -> Tensor:
        """Pixels [B, 3, T, H, W] in [0, 1]; an autoencoder that denoises gets its share of noise, always the same."""
        vae = pipeline.vae
        if not vae.config["timestep_conditioning"]:
            return vae_decode(vae, latents)
        # The stock pipeline mixes noise into raw latents: mixing it into ours in the same share is the same.
        scale, shift = _raw(vae, latents)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(DECODE_SEED)).to(latents)
        mixed = (1 - DECODE_NOISE) * latents + DECODE_NOISE * (noise - shift) / scale
        time = torch.full((len(latents),), DECODE_TIME, device=latents.device, dtype=vae.dtype)
        return vae_decode(vae, mixed, temb=time)

    def encode_pixels(self, pipeline: LTXPipeline, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, C, F, h, w]. Raises ValueError for pixels that are no videos of 8 k + 1 frames."""
        if pixels.ndim == 5:
            latent_frames(pixels.shape[2], factor=self.temporal)
        return vae_encode(pipeline.vae, pixels, generator, videos=True)

    def latent_shape(
        self, pipeline: LTXPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w). Raises ValueError when a side is no multiple of 32 pixels, or frames are not 8 k + 1."""
        height, width = pixel_size(STOCK_SIZE, height, width, multiple=max(32, self.spatial))
        count = latent_frames(STOCK_FRAMES if frames is None else frames, factor=self.temporal)
        return pipeline.transformer.config["in_channels"], count, height // self.spatial, width // self.spatial

    def call_sigmas(self, steps: int) -> list[float]:
        """Evenly down to 1 / steps."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def shift_parameter(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
        """The stock call's, linear in the number of positions."""
        return shift_of_tokens(scheduler, shape[-3] * shape[-2] * shape[-1])

    def call_arguments(
        self, pipeline: LTXPipeline, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """Size, frames, frame rate and length of the text, and how the autoencoder ends. Raises ValueError as
        `latent_shape`."""
        self.latent_shape(pipeline, height, width, frames)
        rows, columns = STOCK_SIZE[0] if height is None else height, STOCK_SIZE[1] if width is None else width
        count = STOCK_FRAMES if frames is None else frames
        call = {"height": rows, "width": columns, "num_frames": count, "frame_rate": FRAME_RATE}
        call |= {"max_sequence_length": self.text_tokens}
        if pipeline.vae.config["timestep_conditioning"]:
            call |= {"decode_timestep": DECODE_TIME, "decode_noise_scale": DECODE_NOISE}
        return call

    def prompt_arguments(
        self, pipeline: LTXPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens with their mask."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens, "prompt_attention_mask": condition.token_mask}
        if null is not None:
            found |= {"negative_prompt_embeds": null.tokens, "negative_prompt_attention_mask": null.token_mask}
        return found

    def stock_latents(self, pipeline: LTXPipeline, latents: Tensor) -> Tensor:
        """Flattened."""
        return flatten_positions(latents)

    def canonical_latents(self, pipeline: LTXPipeline, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unflattened."""
        return unflatten_positions(latents, shape[1:])


def _raw(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of raw latents per channel, [1, C, 1, 1, 1]."""
    mean, std = (x.to(latents).view(1, -1, 1, 1, 1) for x in (vae.latents_mean, vae.latents_std))
    return std / vae.config["scaling_factor"], mean


def require_ltx(configs: Configs) -> None:
    """Raises ValueError for an LTX with another scheduler, or with patches, which its stock call does not know."""
    require_flow_scheduler(configs["scheduler"], "LTX-Video", by_size=True)
    network = configs["transformer"]
    require_same_channels(network, default=128)
    patches = network.get("patch_size", 1), network.get("patch_size_t", 1)
    if patches != (1, 1):
        raise ValueError(f"the transformer has patches of {patches}, and LTX-Video reads single positions")
