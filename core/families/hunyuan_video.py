"""HunyuanVideo: transformers with an embedded guidance over video latents (arXiv:2412.03603).

Legend: B batch, F latent frames, N text tokens, D width of a token; latents [B, 16, F, h, w]; pixels
[B, 3, 4 (F - 1) + 1, 8 h, 8 w] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size
from fewstep.core.families.parts.flow import require_flow_scheduler, require_same_channels
from fewstep.core.families.parts.latents import latent_frames, require_scaling, vae_encode

# What the stock call makes when it is told nothing, and tells the network.
STOCK_SIZE, STOCK_FRAMES, TEXT_TOKENS, STOCK_GUIDANCE = (720, 1280), 129, 256, 6.0


@dataclass(frozen=True)
class HunyuanVideoFamily(Family):
    """HunyuanVideo in canonical coordinates: the network's output is the velocity, its time is `time_scale` t.

    Attributes:
        time_scale: the network's time at t = 1, the scheduler's `num_train_timesteps`.
        embedded_guidance: what the network is told, times 1,000; None where it has no embedding of it.
    """

    time_scale: float
    embedded_guidance: float | None = None
    name: ClassVar[str] = "hunyuan_video"
    makes_videos: ClassVar[bool] = True
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )

    @staticmethod
    def from_pipeline(pipeline: HunyuanVideoPipeline) -> HunyuanVideoFamily:
        """The family of a pipeline that `require_hunyuan_video` lets through."""
        guided = bool(pipeline.transformer.config["guidance_embeds"])
        return HunyuanVideoFamily(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            embedded_guidance=STOCK_GUIDANCE if guided else None,
        )

    def velocity(self, network: HunyuanVideoTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time `time_scale` t. Raises ValueError for a condition of another family."""
        mask, pooled = condition.token_mask, condition.pooled
        if mask is None or pooled is None or (condition.guidance is None) == network.config["guidance_embeds"]:
            raise ValueError("HunyuanVideo needs masked and pooled text and a guidance: encode with its family")
        dtype = network_dtype(network)
        told = condition.guidance
        output = network(
            hidden_states=x_t.to(dtype),
            # Rounded as in the stock call, whose state is of the network's dtype from its second step on.
            timestep=(t.expand(len(x_t)) * self.time_scale).to(dtype),
            encoder_hidden_states=condition.text.to(dtype),
            encoder_attention_mask=mask.to(dtype),
            pooled_projections=pooled.to(dtype),
            guidance=None if told is None else told.to(dtype) * 1000.0,
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Video tokens [B, M, D] of a block, which returns (video, text), as [B, D, M]."""
        return output[0].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: HunyuanVideoPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, 256, D] with their mask, and pooled text; HunyuanVideo is not told the size."""
        tokens, pooled, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=TEXT_TOKENS)
        condition = Condition(tokens, pooled, token_mask=mask)
        return condition if self.embedded_guidance is None else condition.with_guidance(self.embedded_guidance)

    def encode_pixels(
        self, pipeline: HunyuanVideoPipeline, pixels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents [B, C, F, h, w]. Raises ValueError for pixels that are no videos of 4 k + 1 frames."""
        if pixels.ndim == 5:
            latent_frames(pixels.shape[2], factor=pipeline.vae_scale_factor_temporal)
        return vae_encode(pipeline.vae, pixels, generator, videos=True)

    def latent_shape(
        self, pipeline: HunyuanVideoPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w). Raises ValueError when a side is no multiple of 16 pixels, or frames are not 4 k + 1."""
        factor, patch = pipeline.vae_scale_factor_spatial, pipeline.transformer.config["patch_size"]
        height, width = pixel_size(STOCK_SIZE, height, width, multiple=max(16, factor * patch))
        count = latent_frames(STOCK_FRAMES if frames is None else frames, factor=pipeline.vae_scale_factor_temporal)
        return pipeline.transformer.config["in_channels"], count, height // factor, width // factor

    def call_sigmas(self, steps: int) -> list[float]:
        """Evenly down to 1 / steps."""
        return np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()

    def call_arguments(
        self,
        pipeline: HunyuanVideoPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """Size and frames. Raises ValueError as `latent_shape`."""
        self.latent_shape(pipeline, height, width, frames)
        rows, columns = STOCK_SIZE[0] if height is None else height, STOCK_SIZE[1] if width is None else width
        return {"height": rows, "width": columns, "num_frames": STOCK_FRAMES if frames is None else frames}

    def text_arguments(self, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
        """The prompts; the stock call guides by a second one where it is given a negative prompt."""
        found: dict[str, Any] = {"prompt": list(prompts)}
        return {**found, "negative_prompt": [""] * len(prompts)} if guided else found

    def prompt_arguments(
        self, pipeline: HunyuanVideoPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens with their mask, and pooled text."""
        found = _embeddings(condition, "")
        return found if null is None else found | _embeddings(null, "negative_")

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """What the network is told, and `true_cfg_scale` for a second call, which is off for 1."""
        told = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return told if told and guidance == 1 else {**told, "true_cfg_scale": guidance}


def _embeddings(condition: Condition, prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}prompt_embeds": condition.tokens,
        f"{prefix}pooled_prompt_embeds": condition.pooled,
        f"{prefix}prompt_attention_mask": condition.token_mask,
    }


def require_hunyuan_video(configs: Configs) -> None:
    """Raises ValueError for a HunyuanVideo that is told a picture, or with another scheduler."""
    require_flow_scheduler(configs["scheduler"], "HunyuanVideo")
    network = configs["transformer"]
    if network.get("image_condition_type") is not None:
        raise ValueError(
            f"the transformer's image_condition_type is {network.get('image_condition_type')}: it is told a picture; "
            "use HunyuanVideo text-to-video"
        )
    require_same_channels(network, default=16)
    require_scaling(configs["vae"])
