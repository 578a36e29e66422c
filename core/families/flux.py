"""FLUX.1 (dev, schnell): transformers over packed latents that speak rectified flow, dev with its guidance embedded.

Legend: B batch, N text tokens, D width of a token, M image tokens (patches of 2 x 2); latents [B, 16, h, w].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size, require_pictures
from fewstep.core.families.parts.flow import require_flow_scheduler, require_same_channels, shift_of_tokens
from fewstep.core.families.parts.latents import pack_patches, positions, require_even, require_scaling, unpack_patches

# Lengths to which the text is padded, all of which the network attends to: dev, and schnell by its model card.
TEXT_TOKENS, SCHNELL_TEXT_TOKENS = 512, 256
# What the stock call tells dev's network.
STOCK_GUIDANCE = 3.5


@dataclass(frozen=True)
class FluxFamily(Family):
    """FLUX.1 in canonical coordinates: the network's output is the velocity of packed latents, its time is t.

    Attributes:
        time_scale: the scheduler's `num_train_timesteps`.
        text_tokens: length of the T5 text. The padding is not masked, so it is part of the condition, and a stock call
            needs it as `max_sequence_length`.
        embedded_guidance: what the network is told; None for schnell, which has no embedding of it.
    """

    time_scale: float
    text_tokens: int
    embedded_guidance: float | None = None
    name: ClassVar[str] = "flux"
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    # The single blocks' proj_out is left out: by this ending it would be the network's own, too.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
    )

    @staticmethod
    def from_pipeline(pipeline: FluxPipeline) -> FluxFamily:
        """The family of a pipeline that `require_flux` lets through."""
        guided = bool(pipeline.transformer.config.guidance_embeds)
        longest = TEXT_TOKENS if guided else SCHNELL_TEXT_TOKENS
        return FluxFamily(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            text_tokens=min(longest, pipeline.tokenizer_2.model_max_length),
            embedded_guidance=STOCK_GUIDANCE if guided else None,
        )

    def velocity(self, network: FluxTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t. Raises ValueError for a condition of another family."""
        if condition.pooled is None or (condition.guidance is None) == network.config["guidance_embeds"]:
            raise ValueError("FLUX.1 needs pooled text, and guidance for dev alone: encode with its family")
        require_even("FLUX.1", tuple(x_t.shape))
        dtype, (height, width) = network_dtype(network), x_t.shape[2:]
        pictures = [x_t] if condition.image_latents is None else [x_t, *condition.image_latents.to(x_t).unbind(2)]
        # Three numbers place a token: 0 for the sample and 1 for a picture to edit, row, and column.
        places = [
            functional.pad(positions(one.shape[2] // 2, one.shape[3] // 2, device=x_t.device), (1, 0), value=number)
            for number, one in enumerate(pictures)
        ]
        output = network(
            hidden_states=torch.cat([pack_patches(one) for one in pictures], dim=1).to(dtype),
            # Rounded where the stock call rounds: a bf16 network sees the thousandth of a bf16 timestep.
            timestep=(t.expand(max(t.numel(), len(x_t))) * self.time_scale).to(dtype) / self.time_scale,
            encoder_hidden_states=condition.text.to(dtype),
            pooled_projections=condition.pooled.to(dtype),
            guidance=condition.guidance,
            img_ids=torch.cat(places).to(dtype),
            txt_ids=x_t.new_zeros(condition.text.shape[1], 3).to(dtype),
            return_dict=False,
        )[0]
        return unpack_patches(output[:, : len(places[0])], (height, width)).to(x_t.dtype)

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Image tokens [B, M, D] of a block, which returns (text, image), as [B, D, M]; a given picture's come last."""
        return output[1][:, : latents[-2] // 2 * (latents[-1] // 2)].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: FluxPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, text_tokens, D] of T5 and the pooled text of CLIP; FLUX.1 is not told the size."""
        tokens, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=self.text_tokens)
        condition = Condition(tokens, pooled)
        return condition if self.embedded_guidance is None else condition.with_guidance(self.embedded_guidance)

    def latent_shape(
        self, pipeline: FluxPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError when a side is no multiple of a patch's pixels; stock calls round it down."""
        require_pictures(self.name, frames)
        factor = pipeline.vae_scale_factor
        side = pipeline.default_sample_size * factor
        height, width = pixel_size((side, side), height, width, multiple=2 * factor)
        return pipeline.transformer.config.in_channels // 4, height // factor, width // factor

    def network_time(self, t: float) -> float:
        """t itself."""
        return t

    def call_sigmas(self, steps: int) -> list[float]:
        """Evenly down to 1 / steps."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def shift_parameter(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
        """The stock call's, linear in the number of tokens."""
        return shift_of_tokens(scheduler, shape[-2] // 2 * (shape[-1] // 2))

    def call_arguments(
        self, pipeline: FluxPipeline, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """The size where one is given, and the length of the text."""
        size = super().call_arguments(pipeline, height=height, width=width, frames=frames)
        return size | {"max_sequence_length": self.text_tokens}

    def text_arguments(self, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
        """The prompts; the stock call guides by a second one where it is given a negative prompt."""
        found: dict[str, Any] = {"prompt": list(prompts)}
        return {**found, "negative_prompt": [""] * len(prompts)} if guided else found

    def prompt_arguments(
        self, pipeline: FluxPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens and pooled text."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens, "pooled_prompt_embeds": condition.pooled}
        if null is not None:
            found |= {"negative_prompt_embeds": null.tokens, "negative_pooled_prompt_embeds": null.pooled}
        return found

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """What dev's network is told, and `true_cfg_scale` for the second call, which is off for 1."""
        told = {} if self.embedded_guidance is None else {"guidance_scale": self.embedded_guidance}
        return told if told and guidance == 1 else {**told, "true_cfg_scale": guidance}

    def stock_latents(self, pipeline: FluxPipeline, latents: Tensor) -> Tensor:
        """Packed."""
        return pack_patches(latents)

    def canonical_latents(self, pipeline: FluxPipeline, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unpacked."""
        return unpack_patches(latents, (shape[-2], shape[-1]))


def require_flux(configs: Configs) -> None:
    """Raises ValueError for a FLUX.1 that is told a picture (Fill, Control), or with another scheduler."""
    require_flow_scheduler(configs["scheduler"], "FLUX.1", by_size=True)
    require_same_channels(configs["transformer"], default=64)
    require_scaling(configs["vae"])
