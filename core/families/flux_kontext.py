"""FLUX.1 Kontext: FLUX.1 that edits a picture, whose latents stand behind those of the sample (arXiv:2506.15742).

Legend: B batch; latents [B, 16, h, w]; pictures [B, 3, H, W] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.flux import STOCK_GUIDANCE, TEXT_TOKENS, FluxFamily
from fewstep.core.families.parts.latents import PATCH, picture_images, vae_encode

# The stock call brings every size to this number of pixels, unless it is told another.
STOCK_AREA = 1024**2


@dataclass(frozen=True)
class FluxKontextFamily(FluxFamily):
    """FLUX.1 Kontext in canonical coordinates: FLUX.1-dev that is told a picture of the size of the sample.

    The stock call resizes the picture to one of the sizes of its own training; where a run has another, its exports are
    called with `_auto_resize=False` and `max_area`, so that picture and sample are of the size of the run.
    """

    name: ClassVar[str] = "flux_kontext"
    example_call: ClassVar[str] = 'image=picture, prompt="a prompt"'
    takes_picture: ClassVar[bool] = True

    @staticmethod
    def from_pipeline(pipeline: FluxKontextPipeline) -> FluxKontextFamily:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The family of a pipeline that `require_flux` lets through."""
        return FluxKontextFamily(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            text_tokens=min(TEXT_TOKENS, pipeline.tokenizer_2.model_max_length),
            embedded_guidance=STOCK_GUIDANCE if pipeline.transformer.config["guidance_embeds"] else None,
        )

    def velocity(self, network: FluxTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t. Raises ValueError for a condition without a picture."""
        if condition.image_latents is None:
            raise ValueError("Kontext is told a picture, and the condition has none: encode with pictures")
        return super().velocity(network, x_t, t, condition)

    def picture_fields(self, pipeline: Any, pixels: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The latents of the pictures."""
        return {"image_latents": vae_encode(pipeline.vae, pixels, None)[:, :, None]}

    def picture_arguments(self, pixels: Tensor) -> dict[str, Any]:
        """The picture as an image."""
        return {"image": picture_images(pixels)[0]}

    def call_arguments(
        self, pipeline: Any, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """The size, the length of the text, and what keeps the stock call from another size."""
        size = self.full_size(pipeline, height, width, factor=pipeline.vae_scale_factor)
        found, (high, wide) = super().call_arguments(pipeline, **size, frames=frames), size.values()
        if (high, wide) != _stock_size(high, wide, PATCH * pipeline.vae_scale_factor):
            found["max_area"] = high * wide
        nearest = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda size: abs(wide / high - size[0] / size[1]))
        return found if nearest == (wide, high) else {**found, "_auto_resize": False}


def _stock_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """What a stock call without `max_area` makes of a size."""
    ratio = width / height
    sides = (round((STOCK_AREA / ratio) ** 0.5), round((STOCK_AREA * ratio) ** 0.5))
    return sides[0] // multiple * multiple, sides[1] // multiple * multiple
