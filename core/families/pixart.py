"""PixArt-Sigma: transformers that predict eps on a DDPM noise table (arXiv:2403.04692).

Legend: B batch, N text tokens, D width of a token, M image tokens (patches of 2 x 2); latents [B, 4, h, w].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, network_dtype, pixel_size, require_pictures
from fewstep.core.families.parts.latents import require_scaling
from fewstep.core.families.parts.noise_table import TableFamily, noise_table, require_table

TEXT_TOKENS = 300


@dataclass(frozen=True)
class PixArtFamily(TableFamily):
    """PixArt-Sigma in canonical coordinates: half of the network's channels are eps, the rest a variance it learnt.

    Its text is not cleaned, which would need two more packages: a stock call has to be told the same, and so its size,
    which it would otherwise round to one of a table.

    Attributes:
        text_tokens: length of the text; its padding is masked.
    """

    text_tokens: int = TEXT_TOKENS
    name: ClassVar[str] = "pixart"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @staticmethod
    def from_pipeline(pipeline: PixArtSigmaPipeline) -> PixArtFamily:
        """The family of a pipeline that `require_pixart` lets through."""
        length = min(TEXT_TOKENS, pipeline.tokenizer.model_max_length)
        return PixArtFamily(noise_table(pipeline.scheduler), "epsilon", text_tokens=length)

    def velocity(self, network: PixArtTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `TableFamily`. Raises ValueError for a condition of another family."""
        if condition.token_mask is None:
            raise ValueError("PixArt needs a mask of its text, and the condition has none: encode with its family")
        t = t.expand(x_t.shape[0])
        (x, time), dtype = self.network_input(x_t, t), network_dtype(network)
        output = network(
            x.to(dtype),
            encoder_hidden_states=condition.text.to(dtype),
            encoder_attention_mask=condition.token_mask,
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return self.velocity_of(output[:, : x_t.shape[1]].to(x_t.dtype), x_t, x, t)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: PixArtSigmaPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, text_tokens, D] with their mask; PixArt-Sigma is not told the size."""
        tokens, mask, _, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_tokens, clean_caption=False
        )
        return Condition(tokens, token_mask=mask)

    def latent_shape(
        self, pipeline: PixArtSigmaPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError when a side is no multiple of the pixels that a patch covers."""
        require_pictures(self.name, frames)
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        side = config["sample_size"] * factor
        height, width = pixel_size((side, side), height, width, multiple=factor * config["patch_size"])
        return config["in_channels"], height // factor, width // factor

    def call_arguments(
        self,
        pipeline: PixArtSigmaPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """The size without binning, and the text as it is. Raises ValueError as `latent_shape`."""
        _, rows, columns = self.latent_shape(pipeline, height, width, frames)
        factor = pipeline.vae_scale_factor
        return {
            "height": rows * factor,
            "width": columns * factor,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": self.text_tokens,
        }


def require_pixart(configs: Configs) -> None:
    """Raises ValueError for PixArt-Alpha, which is told the size, and for another noise table."""
    network, scheduler = configs["transformer"], configs["scheduler"]
    require_table(scheduler, "PixArt")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != "epsilon" or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(f"PixArt predicts eps on a table that does not end in noise alone, got {prediction!r}")
    if network.get("use_additional_conditions"):
        raise ValueError("the transformer is told size and aspect (use_additional_conditions): use PixArt-Sigma")
    require_scaling(configs["vae"])
