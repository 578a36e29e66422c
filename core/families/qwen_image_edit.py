"""Qwen-Image-Edit and Edit-Plus: Qwen-Image whose network and text encoder are both shown a picture (arXiv:2508.02324).

Legend: B batch; latents [B, 16, h, w]; pictures [B, 3, H, W] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs
from fewstep.core.families.parts.flow import require_flow_scheduler
from fewstep.core.families.parts.latents import picture_images, vae_encode
from fewstep.core.families.qwen_image import NULL_PROMPT, QwenImageFamily

# Pixels of what is shown where there is no picture yet.
GREY_SIDE = 64

AnyEditPipeline: TypeAlias = QwenImageEditPipeline | QwenImageEditPlusPipeline


@dataclass(frozen=True)
class QwenImageEditFamily(QwenImageFamily):
    """Qwen-Image-Edit in canonical coordinates.

    The latents of the picture stand behind those of the sample, and the text encoder reads prompt and picture together;
    so does the unconditional side. Whatever its size, the stock call resizes the picture to 1024 x 1024 pixels of its
    own shape (Edit-Plus to 384 x 384 for the text encoder), which makes it 4,096 tokens of its own, and makes one
    sample a call.
    """

    name: ClassVar[str] = "qwen_image_edit"
    example_call: ClassVar[str] = 'image=picture, prompt="a prompt"'
    # One picture and one prompt are what both stock classes read alike.
    probe_prompts: ClassVar[tuple[str, ...]] = ("a cat",)
    takes_picture: ClassVar[bool] = True
    text_sees_picture: ClassVar[bool] = True

    @staticmethod
    def from_pipeline(pipeline: AnyEditPipeline) -> QwenImageEditFamily:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The family of a pipeline that `require_qwen_image_edit` lets through."""
        return QwenImageEditFamily(time_scale=pipeline.scheduler.config["num_train_timesteps"])

    def velocity(self, network: QwenImageTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t. Raises ValueError for a condition without a picture."""
        if condition.image_latents is None:
            raise ValueError("Qwen-Image-Edit is told a picture, and the condition has none: encode with pictures")
        return super().velocity(network, x_t, t, condition)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: Any, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, N, D] with their mask, of the texts and a grey picture: both classes read no text without one.

        What stands for a sample has to be `encode_with_pictures`.
        """
        shown = self._shown_text(pipeline, Image.new("RGB", (GREY_SIDE, GREY_SIDE), "grey"))
        return Condition.cat([_masked(*pipeline.encode_prompt([text], image=shown)) for text in prompts])

    @torch.no_grad()
    def encode_with_pictures(
        self,
        pipeline: Any,
        prompts: list[str],
        pixels: Tensor,
        shape: tuple[int, ...],
        *,
        negative_prompt: str | None = None,
    ) -> Condition:
        """Tokens of each prompt with its picture, those of the negative prompt with it, and the picture's latents."""
        negative = NULL_PROMPT if negative_prompt is None else negative_prompt
        rows = []
        # One by one, as stock calls are: a batch of pictures is read otherwise by either class.
        for prompt, image in zip(prompts, picture_images(pixels), strict=True):
            shown = self._shown_text(pipeline, image)
            told, null = (_masked(*pipeline.encode_prompt([text], image=shown)) for text in (prompt, negative))
            fields = {"null_tokens": null.tokens, "null_token_mask": null.token_mask}
            rows.append(dataclasses.replace(told, **fields))
        return dataclasses.replace(Condition.cat(rows), **self.picture_fields(pipeline, pixels, shape))

    def _shown_text(self, pipeline: Any, image: Image.Image) -> Image.Image | list[Image.Image]:
        """The picture as the text encoder is shown it."""
        if isinstance(pipeline, QwenImageEditPlusPipeline):
            return [self._resized(pipeline, image, CONDITION_IMAGE_SIZE)]
        return self._resized(pipeline, image, VAE_IMAGE_SIZE)

    def _resized(self, pipeline: Any, image: Image.Image, area: int) -> Image.Image:
        width, height = calculate_dimensions(area, image.width / image.height)
        return pipeline.image_processor.resize(image, height, width)

    def picture_fields(self, pipeline: Any, pixels: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The latents of the pictures."""
        width, height = calculate_dimensions(VAE_IMAGE_SIZE, pixels.shape[3] / pixels.shape[2])
        images = picture_images(pixels)
        # Edit resizes twice, which is once where the sides of its autoencoder's patches divide 32 pixels.
        if not isinstance(pipeline, QwenImageEditPlusPipeline):
            images = [self._resized(pipeline, image, VAE_IMAGE_SIZE) for image in images]
        resized = [pipeline.image_processor.preprocess(image, height, width) for image in images]
        shown = torch.cat(resized).to(pixels) / 2 + 0.5
        return {"image_latents": vae_encode(pipeline.vae, shown[:, :, None], None, videos=True)}

    def picture_arguments(self, pixels: Tensor) -> dict[str, Any]:
        """The picture as an image."""
        return {"image": picture_images(pixels)[0]}

    def call_arguments(
        self, pipeline: Any, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """The size always: the stock call would take one of the shape of the picture."""
        size = self.full_size(pipeline, height, width, factor=pipeline.vae_scale_factor)
        return super().call_arguments(pipeline, **size, frames=frames)


def _masked(tokens: Tensor, mask: Tensor | None) -> Condition:
    """A condition with a mask also where all tokens are of the text."""
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return Condition(tokens, token_mask=mask)


def require_qwen_image_edit(configs: Configs) -> None:
    """Raises ValueError for a Qwen-Image-Edit of layers, or with another scheduler."""
    require_flow_scheduler(configs["scheduler"], "Qwen-Image-Edit", by_size=True)
    network = configs["transformer"]
    takes, gives = network.get("in_channels", 64), 4 * (network.get("out_channels") or 16)
    told = [name for name in ("use_additional_t_cond", "use_layer3d_rope", "guidance_embeds") if network.get(name)]
    if takes != gives or told:
        raise ValueError(
            f"the transformer takes {takes} channels and gives {gives}, with {', '.join(told) or 'no other inputs'}: a "
            "layered model, or none of Qwen-Image-Edit; use Qwen-Image-Edit, Edit-2509 or Edit-2511"
        )
