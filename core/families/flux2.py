"""FLUX.2 (dev, klein): transformers over patches of an autoencoder that normalises them by statistics of its own.

Legend: B batch, N text tokens, D width of a token, M image tokens; latents [B, 128, h, w] are patches of 2 x 2 of the
autoencoder's [B, 32, 2 h, 2 w], channels first, then rows.
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size, require_pictures
from fewstep.core.families.parts.flow import require_flow_scheduler, require_same_channels
from fewstep.core.families.parts.latents import (
    PATCH,
    flatten_positions,
    picture_images,
    positions,
    unflatten_positions,
)

AnyFlux2Pipeline: TypeAlias = Flux2Pipeline | Flux2KleinPipeline

# What the stock call tells dev's network.
STOCK_GUIDANCE = 4.0
TEXT_TOKENS = 512
PICTURE_STRIDE = 10
# Larger pictures are shrunk by the stock call, in pixels.
LARGEST_PICTURE = 1024 * 1024
# Others are refused by it.
SHORTEST_SIDE, LONGEST_RATIO = 64, 8


@dataclass(frozen=True)
class Flux2Family(Family):
    """FLUX.2 in canonical coordinates: the network's output is the velocity of flattened latents, its time is t.

    dev has its guidance embedded and its stock call makes no second one. klein's base guides by the empty prompt; its
    distilled releases, which are few-step students already, do not.

    Attributes:
        time_scale: the scheduler's `num_train_timesteps`.
        text_tokens: length of the text, whose padding the network attends to; a stock call needs it as
            `max_sequence_length`.
        embedded_guidance: what the network is told; None for klein, which has no embedding of it.
    """

    time_scale: float
    text_tokens: int
    embedded_guidance: float | None = None
    name: ClassVar[str] = "flux2"
    # A picture would come first.
    example_call: ClassVar[str] = 'prompt="a prompt"'
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks", "single_transformer_blocks")
    # attn.to_out of the single blocks is a layer, and of the others a list: no ending means one alone.
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "linear_in",
        "linear_out",
        "to_qkv_mlp_proj",
    )

    @staticmethod
    def from_pipeline(pipeline: AnyFlux2Pipeline) -> Flux2Family:
        """The family of a pipeline that `require_flux2` lets through."""
        guided = bool(pipeline.transformer.config["guidance_embeds"])
        # dev's tokenizer is a processor, whose own tokenizer knows the length.
        tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
        return Flux2Family(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            text_tokens=min(TEXT_TOKENS, tokenizer.model_max_length),
            embedded_guidance=STOCK_GUIDANCE if guided else None,
        )

    def told_pictures(self) -> Flux2PictureFamily:
        """The same that is told a picture with each prompt."""
        return Flux2PictureFamily(self.time_scale, self.text_tokens, self.embedded_guidance)

    def velocity(self, network: Flux2Transformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t. Raises ValueError for a condition of another family."""
        if (condition.guidance is None) == network.config["guidance_embeds"]:
            raise ValueError("FLUX.2 is told a guidance, and klein is not: encode with the family of this network")
        dtype, (height, width) = network_dtype(network), x_t.shape[2:]
        pictures = [x_t] if condition.image_latents is None else [x_t, *condition.image_latents.to(x_t).unbind(2)]
        # Four numbers place a token: 0 for the sample and 10, 20, ... for pictures to follow, row, column, and place in
        # the text.
        places = [
            functional.pad(
                functional.pad(positions(*one.shape[2:], device=x_t.device), (1, 0), value=PICTURE_STRIDE * number),
                (0, 1),
            ).long()
            for number, one in enumerate(pictures)
        ]
        words = functional.pad(positions(condition.text.shape[1], device=x_t.device), (3, 0)).long()
        output = network(
            hidden_states=torch.cat([flatten_positions(one) for one in pictures], dim=1).to(dtype),
            # Rounded where the stock call rounds: a bf16 network sees the thousandth of a bf16 timestep.
            timestep=(t.expand(max(t.numel(), len(x_t))) * self.time_scale).to(dtype) / self.time_scale,
            encoder_hidden_states=condition.text.to(dtype),
            guidance=condition.guidance,
            img_ids=torch.cat(places),
            txt_ids=words,
            return_dict=False,
        )[0]
        return unflatten_positions(output[:, : height * width], (height, width)).to(x_t.dtype)

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Image tokens of a block as [B, D, M]: of (text, image), or of both in one sequence, whose end are the tokens
        of a given picture."""
        count, start = latents[-2] * latents[-1], 0 if isinstance(output, tuple) else self.text_tokens
        joint = output[1] if isinstance(output, tuple) else output
        return joint[:, start : start + count].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: AnyFlux2Pipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, text_tokens, D] of three layers of the language model; FLUX.2 is not told the size."""
        tokens, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=self.text_tokens)
        condition = Condition(tokens)
        return condition if self.embedded_guidance is None else condition.with_guidance(self.embedded_guidance)

    def decode_latents(self, pipeline: AnyFlux2Pipeline, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1], fp32 at least."""
        vae: Any = pipeline.vae
        pixels = vae.decode(_denormalised(vae, latents).to(vae.dtype), return_dict=False)[0]
        return (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)

    def encode_pixels(
        self, pipeline: AnyFlux2Pipeline, pixels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents at the scale of the network. Raises ValueError for pixels that are no batch of pictures."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, H, W], got shape {tuple(pixels.shape)}")
        vae: Any = pipeline.vae
        posterior = vae.encode((pixels * 2 - 1).to(vae.dtype), return_dict=False)[0]
        raw = posterior.mode() if generator is None else posterior.sample(generator)
        return _normalised(vae, raw.to(torch.promote_types(raw.dtype, torch.float32)))

    def latent_shape(
        self, pipeline: AnyFlux2Pipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError when a side is no multiple of a patch's pixels; stock calls round it down."""
        require_pictures(self.name, frames)
        factor = PATCH * pipeline.vae_scale_factor
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        height, width = pixel_size((side, side), height, width, multiple=factor)
        return pipeline.transformer.config["in_channels"], height // factor, width // factor

    def network_time(self, t: float) -> float:
        """t itself."""
        return t

    def call_sigmas(self, steps: int) -> list[float]:
        """Evenly down to 1 / steps."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def shift_parameter(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
        """The stock call's, which depends on the tokens and on the number of steps."""
        return compute_empirical_mu(image_seq_len=shape[-2] * shape[-1], num_steps=steps)

    def call_arguments(
        self,
        pipeline: AnyFlux2Pipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """The size where one is given, and the length of the text."""
        size = super().call_arguments(pipeline, height=height, width=width, frames=frames)
        return size | {"max_sequence_length": self.text_tokens}

    def prompt_arguments(
        self, pipeline: AnyFlux2Pipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens}
        return found if null is None else {**found, "negative_prompt_embeds": null.tokens}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """What dev's network is told; for klein the scale of two calls, off for 1.

        Raises ValueError for dev and another guidance than 1: its stock call makes no second one.
        """
        if self.embedded_guidance is None:
            return {"guidance_scale": guidance}
        if guidance != 1:
            raise ValueError(
                f"guidance is {guidance}, and the stock call of FLUX.2-dev makes no second call of the network: set "
                "embedded_guidance, which its network is told"
            )
        return {"guidance_scale": self.embedded_guidance}

    def stock_state(self, pipeline: AnyFlux2Pipeline, latents: Tensor) -> Tensor:
        """Flattened, though the call takes its latents as they are."""
        return flatten_positions(latents)

    def canonical_latents(self, pipeline: AnyFlux2Pipeline, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Of dev's flattened state, or of what klein gives, which is the autoencoder's own."""
        if latents.ndim == 3:
            return unflatten_positions(latents, shape[-2:])
        return latents if latents.shape[1] == shape[0] else _normalised(pipeline.vae, latents)

    def mark_student(self, pipeline: AnyFlux2Pipeline) -> None:
        """A klein that is marked as distilled makes one call at whatever guidance."""
        if isinstance(pipeline, Flux2KleinPipeline):
            pipeline.register_to_config(is_distilled=True)


@dataclass(frozen=True)
class Flux2PictureFamily(Flux2Family):
    """FLUX.2 that is told a picture to edit or to follow: its latents stand behind those of the sample.

    The picture is of the size of the sample, or shrunk as the stock call shrinks it.
    """

    name: ClassVar[str] = "flux2_picture"
    example_call: ClassVar[str] = 'image=picture, prompt="a prompt"'
    takes_picture: ClassVar[bool] = True

    def velocity(self, network: Flux2Transformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t. Raises ValueError for a condition without a picture."""
        if condition.image_latents is None:
            raise ValueError("this FLUX.2 is told a picture, and the condition has none: encode with pictures")
        return super().velocity(network, x_t, t, condition)

    def latent_shape(
        self, pipeline: AnyFlux2Pipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError as for text alone, and for pictures that the stock call refuses."""
        shape = super().latent_shape(pipeline, height, width, frames)
        high, wide = (side * PATCH * pipeline.vae_scale_factor for side in shape[1:])
        if min(high, wide) < SHORTEST_SIDE or max(high, wide) > LONGEST_RATIO * min(high, wide):
            raise ValueError(
                f"pictures of {high} x {wide} pixels: the stock call of FLUX.2 is told sides of at least "
                f"{SHORTEST_SIDE} pixels, one at most {LONGEST_RATIO} times the other; set data.height and data.width"
            )
        return shape

    def picture_fields(self, pipeline: AnyFlux2Pipeline, pixels: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The latents of the pictures."""
        if pixels.shape[2] * pixels.shape[3] > LARGEST_PICTURE:
            pixels = torch.stack([self._shrunk(pipeline, image) for image in picture_images(pixels)]).to(pixels)
        return {"image_latents": self.encode_pixels(pipeline, pixels)[:, :, None]}

    def _shrunk(self, pipeline: AnyFlux2Pipeline, image: Image.Image) -> Tensor:
        processor: Any = pipeline.image_processor
        small = processor._resize_to_target_area(image, LARGEST_PICTURE)
        side = PATCH * pipeline.vae_scale_factor
        width, height = (length // side * side for length in small.size)
        return processor.preprocess(small, height=height, width=width, resize_mode="crop")[0] / 2 + 0.5

    def picture_arguments(self, pixels: Tensor) -> dict[str, Any]:
        """The picture as an image: several would be several pictures to follow at once."""
        return {"image": picture_images(pixels)[0]}

    def call_arguments(
        self,
        pipeline: AnyFlux2Pipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """The size always: the stock call would take that of the picture."""
        size = self.full_size(pipeline, height, width, factor=PATCH * pipeline.vae_scale_factor)
        return super().call_arguments(pipeline, **size, frames=frames)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's patches, [1, C, 1, 1]."""
    mean, variance = (x.to(latents).view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config["batch_norm_eps"]).sqrt()


def _normalised(vae: Any, raw: Tensor) -> Tensor:
    """Latents at the scale of the network from the autoencoder's [B, C / 4, 2 h, 2 w]."""
    patches = rearrange(raw, "b c (h p) (w q) -> b (c p q) h w", p=PATCH, q=PATCH)
    mean, std = _statistics(vae, patches)
    return (patches - mean) / std


def _denormalised(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _statistics(vae, latents)
    return rearrange(latents * std + mean, "b (c p q) h w -> b c (h p) (w q)", p=PATCH, q=PATCH)


def require_flux2(configs: Configs) -> None:
    """Raises ValueError for a FLUX.2 with another scheduler, or whose network takes other channels than it gives."""
    require_flow_scheduler(configs["scheduler"], "FLUX.2", by_size=True)
    require_same_channels(configs["transformer"], default=128)
