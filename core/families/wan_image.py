"""Wan that is told its first frame: Wan 2.1 and 2.2 image-to-video, and the image mode of Wan 2.2 TI2V-5B.

Legend: B batch, F latent frames, R image tokens of CLIP; latents [B, C, F, h, w]; pictures [B, 3, H, W] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from torch import Tensor
from torch.nn import functional

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, network_dtype
from fewstep.core.families.parts.flow import require_flow_scheduler
from fewstep.core.families.parts.latents import picture_images, vae_encode
from fewstep.core.families.wan import STOCK_TEXT_TOKENS, WanFamily, require_experts
from fewstep.core.networks.experts import Experts
from fewstep.core.paths import expand_time


@dataclass(frozen=True)
class WanImageFamily(WanFamily):
    """Wan image-to-video in canonical coordinates.

    Of Wan 2.1 and 2.2 A14B the network takes, behind the state, a mask of the given frames and the latents of a video
    whose first frame is the picture and whose others are grey; Wan 2.1 also CLIP's tokens of the picture. Of TI2V-5B
    (`time_per_token`) it takes the picture's latents in the place of the first latent frame, and time 0 there. What it
    says of that frame is not used: the state there moves straight to the picture, so that its x0 is the picture at
    every time, and losses over all frames see a difference of exactly 0.
    """

    name: ClassVar[str] = "wan_image"
    example_call: ClassVar[str] = 'image=picture, prompt="a prompt"'
    takes_picture: ClassVar[bool] = True

    @staticmethod
    def from_pipeline(pipeline: WanImageToVideoPipeline) -> WanImageFamily:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The family of a pipeline that `require_wan_image` lets through."""
        return WanImageFamily(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            # The attention of Wan 2.1 tells text from image by this length alone.
            text_tokens=STOCK_TEXT_TOKENS,
            time_per_token=bool(pipeline.config["expand_timesteps"]),
            boundary=pipeline.config["boundary_ratio"],
        )

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time `time_scale` t. Raises ValueError for a condition without a picture."""
        if isinstance(network, Experts):
            return network(self.velocity, x_t, t, condition)
        given = condition.image_latents
        if given is None:
            raise ValueError("this Wan is told a picture, and the condition has none: encode with pictures")
        dtype = network_dtype(network)
        if self.time_per_token:
            return self._velocity_behind_the_picture(network, x_t, t, condition)
        assert condition.image_mask is not None
        output = network(
            hidden_states=torch.cat([x_t, condition.image_mask.to(x_t), given.to(x_t)], dim=1).to(dtype),
            timestep=self._timestep(network, x_t, t),
            encoder_hidden_states=condition.text.to(dtype),
            encoder_hidden_states_image=None if condition.image_tokens is None else condition.image_tokens.to(dtype),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def _velocity_behind_the_picture(
        self, network: WanTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        assert condition.image_latents is not None
        given = condition.image_latents.to(x_t)
        per_frame = t if t.ndim == 2 else t[:, None].expand(-1, x_t.shape[2])
        told = functional.pad(per_frame[:, 1:], (1, 0))
        state = torch.cat([given, x_t[:, :, 1:]], dim=2)
        free = super().velocity(network, state, told, condition)
        start = per_frame[:, :1].clamp(min=torch.finfo(x_t.dtype).tiny)
        to_picture = (x_t[:, :, :1] - given) / expand_time(start, x_t[:, :, :1])
        return torch.cat([to_picture.to(free), free[:, :, 1:]], dim=2)

    def picture_fields(self, pipeline: Any, pixels: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What a condition says of pictures [B, 3, H, W]; `shape` is of the latents of the videos."""
        vae = pipeline.vae
        if self.time_per_token:
            return {"image_latents": vae_encode(vae, pixels[:, :, None], None, videos=True)}
        factor = vae.config["scale_factor_temporal"]
        # Grey is 0 in the units of the autoencoder.
        grey = pixels.new_full((len(pixels), 3, factor * (shape[1] - 1), *pixels.shape[2:]), 0.5)
        latents = vae_encode(vae, torch.cat([pixels[:, :, None], grey], dim=2), None, videos=True)
        mask = torch.zeros(len(pixels), factor, *shape[1:], device=pixels.device)
        mask[:, :, 0] = 1
        found = {"image_latents": latents, "image_mask": mask}
        if self.network(pipeline).config["image_dim"] is not None:
            found["image_tokens"] = pipeline.encode_image(picture_images(pixels))
        return found

    def first_frame_fields(self, pipeline: Any, latents: Tensor) -> dict[str, Tensor]:
        """The same of the first frame of videos of which there are latents."""
        if self.time_per_token:
            return {"image_latents": latents[:, :, :1]}
        return super().first_frame_fields(pipeline, latents)

    def picture_arguments(self, pixels: Tensor) -> dict[str, Any]:
        """One picture for all prompts: the stock call takes no list."""
        return {"image": picture_images(pixels[:1])[0]}

    def latent_shape(
        self, pipeline: Any, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w) of a video, C of the state alone."""
        _, *rest = self.video_shape(pipeline, frames=frames, height=height, width=width)
        count, high, wide = rest
        return self.network(pipeline).config["out_channels"], count, high, wide


def require_wan_image(configs: Configs) -> None:
    """Raises ValueError for another scheduler than rectified flow's, and for networks that are told no first frame."""
    require_experts(configs)
    require_flow_scheduler(configs["scheduler"], "Wan")
    network, index = configs["transformer"], configs[""]
    takes, gives = network.get("in_channels", 16), network.get("out_channels", 16)
    expected = gives if index.get("expand_timesteps") else 2 * gives + 4
    if takes != expected or network.get("pos_embed_seq_len") is not None:
        raise ValueError(
            f"the network takes {takes} channels and gives {gives}, pos_embed_seq_len "
            f"{network.get('pos_embed_seq_len')}: it is told other pictures than a first frame; use Wan 2.1 or 2.2 "
            "image-to-video, or TI2V-5B"
        )
