"""CogVideoX (2b, 5b): transformers that predict v on a noise table that ends in noise alone (arXiv:2408.06072).

Legend: B batch, F latent frames, N text tokens, D width of a token; latents [B, 16, F, h, w], which the stock pipeline
holds with frames first; pixels [B, 3, 4 (F - 1) + 1, 8 h, 8 w] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, network_dtype, pixel_size
from fewstep.core.families.parts.latents import latent_frames, require_scaling, vae_encode
from fewstep.core.families.parts.noise_table import TableFamily, noise_table, require_table

TEXT_TOKENS = 226


@dataclass(frozen=True)
class CogVideoXFamily(TableFamily):
    """CogVideoX in canonical coordinates.

    Attributes:
        text_tokens: length of the text, whose padding the network attends to; a stock call needs it as
            `max_sequence_length`.
        spatial: pixels that a latent stands for.
    """

    text_tokens: int = TEXT_TOKENS
    spatial: int = 8
    name: ClassVar[str] = "cogvideox"
    makes_videos: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @staticmethod
    def from_pipeline(pipeline: CogVideoXPipeline) -> CogVideoXFamily:
        """The family of a pipeline that `require_cogvideox` lets through."""
        return CogVideoXFamily(
            noise_table(pipeline.scheduler),
            "v_prediction",
            text_tokens=min(TEXT_TOKENS, pipeline.tokenizer.model_max_length),
            spatial=pipeline.vae_scale_factor_spatial,
        )

    def velocity(self, network: CogVideoXTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `TableFamily`. Raises ValueError for latents that are no video."""
        if x_t.ndim != 5:
            raise ValueError(f"CogVideoX takes latents [B, C, F, h, w], got shape {tuple(x_t.shape)}")
        t = t.expand(x_t.shape[0])
        (x, time), dtype = self.network_input(x_t, t), network_dtype(network)
        output = network(
            hidden_states=x.transpose(1, 2).to(dtype),
            encoder_hidden_states=condition.text.to(dtype),
            timestep=time,
            image_rotary_emb=self._rotary(network, x_t),
            return_dict=False,
        )[0]
        return self.velocity_of(output.transpose(1, 2).to(x_t.dtype), x_t, x, t)

    def _rotary(self, network: CogVideoXTransformer3DModel, x_t: Tensor) -> Any:
        if not network.config["use_rotary_positional_embeddings"]:
            return None
        frames, height, width = x_t.shape[2:]
        # The stock method reads no more of its pipeline than this.
        parts: Any = SimpleNamespace(vae_scale_factor_spatial=self.spatial, transformer=network)
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(
            parts, height * self.spatial, width * self.spatial, frames, x_t.device
        )

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Video tokens [B, M, D] of a block, which returns (video, text), as [B, D, M]."""
        return output[0].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: CogVideoXPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, text_tokens, D]; CogVideoX is not told the size."""
        tokens, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return Condition(tokens)

    def encode_pixels(
        self, pipeline: CogVideoXPipeline, pixels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents [B, C, F, h, w]. Raises ValueError for pixels that are no videos of 4 k + 1 frames."""
        if pixels.ndim == 5:
            latent_frames(pixels.shape[2], factor=pipeline.vae_scale_factor_temporal)
        return vae_encode(pipeline.vae, pixels, generator, videos=True)

    def latent_shape(
        self, pipeline: CogVideoXPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w). Raises ValueError when a side is no multiple of a patch's pixels, or frames are not 4 k + 1."""
        config = pipeline.transformer.config
        factor, temporal = self.spatial, pipeline.vae_scale_factor_temporal
        stock = config["sample_height"] * factor, config["sample_width"] * factor
        height, width = pixel_size(stock, height, width, multiple=factor * config["patch_size"])
        count = config["sample_frames"] if frames is None else frames
        return config["in_channels"], latent_frames(count, factor=temporal), height // factor, width // factor

    def call_arguments(
        self,
        pipeline: CogVideoXPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """Size, frames and length of the text. Raises ValueError as `latent_shape`."""
        _, _, rows, columns = self.latent_shape(pipeline, height, width, frames)
        count = pipeline.transformer.config["sample_frames"] if frames is None else frames
        size = {"height": rows * self.spatial, "width": columns * self.spatial, "num_frames": count}
        return size | {"max_sequence_length": self.text_tokens}

    def prompt_arguments(
        self, pipeline: CogVideoXPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens}
        return found if null is None else {**found, "negative_prompt_embeds": null.tokens}

    def stock_latents(self, pipeline: CogVideoXPipeline, latents: Tensor) -> Tensor:
        """Frames first."""
        return latents.transpose(1, 2)

    def canonical_latents(self, pipeline: CogVideoXPipeline, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Channels first."""
        return latents.transpose(1, 2)


def require_cogvideox(configs: Configs) -> None:
    """Raises ValueError for CogVideoX 1.5 and for image-to-video, and for another noise table."""
    network, scheduler = configs["transformer"], configs["scheduler"]
    require_table(scheduler, "CogVideoX")
    if scheduler.get("prediction_type") != "v_prediction":
        raise ValueError(f"CogVideoX predicts v, and the scheduler says {scheduler.get('prediction_type')!r}")
    if network.get("patch_size_t") is not None:
        raise ValueError(
            f"the transformer's patch_size_t is {network.get('patch_size_t')} (CogVideoX 1.5), whose stock call adds "
            "frames that it cuts off again: use CogVideoX 2b or 5b"
        )
    takes, gives = network.get("in_channels", 16), network.get("out_channels", 16)
    if takes != gives:
        raise ValueError(
            f"the transformer takes {takes} channels and gives {gives}: it is told a picture; use 2b or 5b"
        )
    require_scaling(configs["vae"])
