"""Stable Diffusion 1.5 and XL: U-Nets that predict eps or v on a DDPM noise table.

Legend: B batch, N text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, network_dtype, pixel_size, require_pictures
from fewstep.core.families.parts.latents import require_scaling
from fewstep.core.families.parts.noise_table import TableFamily, noise_table, require_table

UnetPipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass(frozen=True)
class UnetFamily(TableFamily):
    """A U-Net on a noise table in canonical coordinates.

    Attributes:
        has_size_condition: whether pooled text and six size numbers are given to the network, as in SDXL.
    """

    has_size_condition: bool = False
    name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @staticmethod
    def from_pipeline(pipeline: UnetPipeline) -> UnetFamily:
        """The family of a pipeline that `require_unet` lets through, with the noise table of its scheduler's config."""
        prediction = pipeline.scheduler.config["prediction_type"]
        kind = pipeline.unet.config.addition_embed_type
        return UnetFamily(noise_table(pipeline.scheduler), prediction, has_size_condition=kind == "text_time")

    def network(self, pipeline: UnetPipeline) -> UNet2DConditionModel:
        return pipeline.unet

    def parts(self, network: UNet2DConditionModel) -> dict[str, Any]:
        """The U-Net."""
        return {"unet": network}

    def velocity(self, network: UNet2DConditionModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See the class. Raises ValueError when an SDXL condition lacks pooled text or time_ids."""
        t = t.expand(x_t.shape[0])
        x, time = self.network_input(x_t, t)
        dtype = network_dtype(network)
        output = network(
            x.to(dtype),
            time,
            encoder_hidden_states=condition.text.to(dtype),
            added_cond_kwargs=self._size_condition(condition, dtype),
            return_dict=False,
        )[0].to(x_t.dtype)
        return self.velocity_of(output, x_t, x, t)

    def feature_modules(self, network: UNet2DConditionModel, blocks: Sequence[int] | None) -> list[torch.nn.Module]:
        """The middle block (DMD2, arXiv:2405.14867, Sec. 4.3). Raises ValueError for any choice of blocks."""
        if blocks is not None:
            raise ValueError(
                f"a U-Net gives features of its middle block alone: leave blocks unset, got {list(blocks)}"
            )
        return [network.mid_block]

    def feature_channels(self, network: UNet2DConditionModel, blocks: Sequence[int] | None) -> list[int]:
        return [network.config["block_out_channels"][-1]] * len(self.feature_modules(network, blocks))

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Feature maps [B, C, h, w] as [B, C, h w]."""
        return output.flatten(2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: UnetPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, N, D]; for SDXL also pooled text and the size: original and target size as given, no crop."""
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            tokens, _ = pipeline.encode_prompt(
                prompts,  # pyright: ignore[reportArgumentType]
                pipeline.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            return Condition(tokens)
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompts,  # pyright: ignore[reportArgumentType]
            do_classifier_free_guidance=False,
        )
        size = self._pixel_size(pipeline, height, width)
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=tokens.device)
        return Condition(tokens, pooled, time_ids=time_ids.expand(len(prompts), -1))

    def encode_null(self, pipeline: UnetPipeline, *, height: int | None = None, width: int | None = None) -> Condition:
        """The empty prompt, or zeros where the pipeline's `force_zeros_for_empty_prompt` says so (SDXL base)."""
        empty = self.encode_prompts(pipeline, [""], height=height, width=width)
        if not isinstance(pipeline, StableDiffusionXLPipeline) or not pipeline.config["force_zeros_for_empty_prompt"]:
            return empty
        assert empty.pooled is not None
        return Condition(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled), time_ids=empty.time_ids)

    def latent_shape(
        self, pipeline: UnetPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError when a side is no multiple of what the autoencoder and the U-Net halve away."""
        require_pictures(self.name, frames)
        height, width = self._pixel_size(pipeline, height, width)
        factor = pipeline.vae_scale_factor
        return pipeline.unet.config.in_channels, height // factor, width // factor

    def _size_condition(self, condition: Condition, dtype: torch.dtype) -> dict[str, Tensor] | None:
        if not self.has_size_condition:
            return None
        if condition.pooled is None or condition.time_ids is None:
            raise ValueError(
                "SDXL needs pooled text and time_ids, and the condition lacks them: encode with its family"
            )
        # Sizes stay fp32: a bf16 one would be rounded to 8 bits before the network embeds it.
        return {"text_embeds": condition.pooled.to(dtype), "time_ids": condition.time_ids.float()}

    def _pixel_size(self, pipeline: UnetPipeline, height: int | None, width: int | None) -> tuple[int, int]:
        config, factor = pipeline.unet.config, pipeline.vae_scale_factor
        size = config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        halvings = len(config.block_out_channels) - 1
        return pixel_size((sides[0] * factor, sides[1] * factor), height, width, multiple=factor * 2**halvings)


def require_unet(configs: Configs) -> None:
    """Raises ValueError for U-Nets with other inputs than text, time and SDXL's sizes, and for other noise tables."""
    unet, scheduler = configs["unet"], configs["scheduler"]
    takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if takes != gives:
        raise ValueError(
            f"the U-Net takes {takes} channels and gives {gives}: it is told a picture beside the text (inpainting, "
            "editing); use a text-to-image model"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "the U-Net has an input for the guidance (time_cond_proj_dim), as LCM has: it is a few-step student "
            "already; use the model that it was distilled from"
        )
    if unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None:
        raise ValueError(
            f"the U-Net is told a class (num_class_embeds {unet.get('num_class_embeds')}, class_embed_type "
            f"{unet.get('class_embed_type')}) beside the text; use a text-to-image model"
        )
    kind = unet.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise ValueError(f"the U-Net's addition_embed_type must be null or text_time, got {kind!r}")
    prediction = scheduler.get("prediction_type", "epsilon")
    require_table(scheduler, "a U-Net here")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler's prediction_type must be epsilon or v_prediction, got {prediction!r}")
    if scheduler.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise ValueError(
            "the noise table has zero terminal SNR, where an eps prediction says nothing about x0: set "
            "rescale_betas_zero_snr to false, or prediction_type to v_prediction if the network predicts v"
        )
    require_scaling(configs["vae"])
