"""Qwen-Image: transformers over packed latents that speak rectified flow (arXiv:2508.02324).

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
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size, require_pictures
from fewstep.core.families.parts.flow import require_flow_scheduler, shift_of_tokens
from fewstep.core.families.parts.latents import pack_patches, require_even, unpack_patches, vae_decode, vae_encode

# What the stock call keeps of a text.
TEXT_TOKENS = 512
# The negative prompt of the model's authors; the stock call guides only where it is given one.
NULL_PROMPT = " "


@dataclass(frozen=True)
class QwenImageFamily(Family):
    """Qwen-Image in canonical coordinates: the network's output is the velocity of packed latents, its time is t.

    Guidance keeps the length of each token: u + w (c - u) is scaled to the norm of c over the channels of a patch.

    Attributes:
        time_scale: the scheduler's `num_train_timesteps`.
    """

    time_scale: float
    name: ClassVar[str] = "qwen_image"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )

    @staticmethod
    def from_pipeline(pipeline: QwenImagePipeline) -> QwenImageFamily:
        """The family of a pipeline that `require_qwen_image` lets through."""
        return QwenImageFamily(time_scale=pipeline.scheduler.config["num_train_timesteps"])

    def velocity(self, network: QwenImageTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t. Raises ValueError for a condition of another family."""
        mask = condition.token_mask
        if mask is None:
            raise ValueError("Qwen-Image needs a mask of its text, and the condition has none: encode with its family")
        require_even("Qwen-Image", tuple(x_t.shape))
        dtype, (height, width) = network_dtype(network), x_t.shape[2:]
        pictures = [x_t] if condition.image_latents is None else [x_t, *condition.image_latents.to(x_t).unbind(2)]
        output = network(
            hidden_states=torch.cat([pack_patches(one) for one in pictures], dim=1).to(dtype),
            # Rounded where the stock call rounds: a bf16 network sees the thousandth of a bf16 timestep.
            timestep=(t.expand(max(t.numel(), len(x_t))) * self.time_scale).to(dtype) / self.time_scale,
            encoder_hidden_states=condition.text.to(dtype),
            # Full texts go without, as in the stock call: attention without a mask has the faster kernels.
            encoder_hidden_states_mask=None if bool(mask.all()) else mask.bool(),
            img_shapes=[[(1, one.shape[2] // 2, one.shape[3] // 2) for one in pictures]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack_patches(output[:, : height // 2 * (width // 2)], (height, width)).to(x_t.dtype)

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """u + w (c - u), each patch of 2 x 2 scaled to the norm that c has there."""
        guided = super().combine(unconditional, conditional, scale)
        # The stock pipeline divides by zero where both are zero; the norm of nothing is nothing.
        ratio = _patch_norms(conditional) / _patch_norms(guided).clamp(min=torch.finfo(guided.dtype).tiny)
        return guided * ratio

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Image tokens [B, M, D] of a block, which returns (text, image), as [B, D, M]; a given picture's come last."""
        return output[1][:, : latents[-2] // 2 * (latents[-1] // 2)].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: QwenImagePipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, N, D] with their mask; Qwen-Image is not told the size."""
        tokens, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=TEXT_TOKENS)
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return Condition(tokens, token_mask=mask)

    def encode_null(
        self, pipeline: QwenImagePipeline, *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """A blank, which the model's authors give as the negative prompt."""
        return self.encode_prompts(pipeline, [NULL_PROMPT])

    def decode_latents(self, pipeline: QwenImagePipeline, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1]: the autoencoder is one of videos, of which a picture is the first frame."""
        return vae_decode(pipeline.vae, latents[:, :, None])[:, :, 0]

    def encode_pixels(
        self, pipeline: QwenImagePipeline, pixels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents [B, C, h, w] at the scale of the network. Raises ValueError for pixels that are no pictures."""
        if pixels.ndim != 4:
            raise ValueError(f"pixels must be [B, 3, H, W], got shape {tuple(pixels.shape)}")
        return vae_encode(pipeline.vae, pixels[:, :, None], generator, videos=True)[:, :, 0]

    def latent_shape(
        self, pipeline: QwenImagePipeline, height: int | None, width: int | None, frames: int | None = None
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

    def text_arguments(self, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
        """The prompts; the stock call guides where it is given a negative prompt."""
        found: dict[str, Any] = {"prompt": list(prompts)}
        return {**found, "negative_prompt": [NULL_PROMPT] * len(prompts)} if guided else found

    def prompt_arguments(
        self, pipeline: QwenImagePipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens with their mask."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens, "prompt_embeds_mask": condition.token_mask}
        if null is not None:
            found |= {"negative_prompt_embeds": null.tokens, "negative_prompt_embeds_mask": null.token_mask}
        return found

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """`true_cfg_scale`, whose second call is off for 1."""
        return {"true_cfg_scale": guidance}

    def stock_latents(self, pipeline: QwenImagePipeline, latents: Tensor) -> Tensor:
        """Packed."""
        return pack_patches(latents)

    def canonical_latents(self, pipeline: QwenImagePipeline, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Unpacked."""
        return unpack_patches(latents, (shape[-2], shape[-1]))


def _patch_norms(velocity: Tensor) -> Tensor:
    """The norm of each patch of 2 x 2 over its channels and places, at each of its places: [B, 1, h, w]."""
    norms = pack_patches(velocity).norm(dim=-1, keepdim=True)
    return unpack_patches(norms.expand(-1, -1, 4), (velocity.shape[-2], velocity.shape[-1]))


def require_qwen_image(configs: Configs) -> None:
    """Raises ValueError for a Qwen-Image that is told pictures or layers, or with another scheduler."""
    require_flow_scheduler(configs["scheduler"], "Qwen-Image", by_size=True)
    network = configs["transformer"]
    takes, gives = network.get("in_channels", 64), 4 * (network.get("out_channels") or 16)
    told = [name for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope") if network.get(name)]
    if takes != gives or told or network.get("guidance_embeds"):
        raise ValueError(
            f"the transformer takes {takes} channels and gives {gives}, with {', '.join(told) or 'no other inputs'} "
            f"and guidance_embeds {bool(network.get('guidance_embeds'))}: an editing or layered model; use Qwen-Image, "
            "which is told text alone, or Qwen-Image-Edit"
        )
