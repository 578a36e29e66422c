"""Z-Image (base and turbo): one stream of text and picture that speaks rectified flow, with both signs turned.

Legend: B batch, N text tokens, D width of a token, M image tokens (patches of 2 x 2); latents [B, 16, h, w].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size, require_pictures
from fewstep.core.families.parts.flow import require_flow_scheduler, shift_of_tokens
from fewstep.core.families.parts.latents import require_even, require_scaling


@dataclass(frozen=True)
class ZImageFamily(Family):
    """Z-Image in canonical coordinates: the network is called at 1 - t and gives x0 - eps, minus the velocity.

    It takes lists, of a text its own tokens alone: it pads them to a multiple of 32 with tokens that it looks at, and
    places the picture after them, so a text that was padded further would be another condition.

    Attributes:
        time_scale: the scheduler's `num_train_timesteps`.
    """

    time_scale: float
    name: ClassVar[str] = "z_image"
    # The refiners of noise and text before them see one of both alone.
    block_lists: ClassVar[tuple[str, ...]] = ("layers",)
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "feed_forward.w1",
        "feed_forward.w2",
        "feed_forward.w3",
    )

    @staticmethod
    def from_pipeline(pipeline: ZImagePipeline) -> ZImageFamily:
        """The family of a pipeline that `require_z_image` lets through."""
        return ZImageFamily(time_scale=pipeline.scheduler.config["num_train_timesteps"])

    def velocity(self, network: ZImageTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Minus the transformer's output at time 1 - t. Raises ValueError for a condition of another family."""
        mask = condition.token_mask
        if mask is None:
            raise ValueError("Z-Image needs a mask of its text, and the condition has none: encode with its family")
        require_even("Z-Image", tuple(x_t.shape))
        dtype = network_dtype(network)
        texts = _trimmed(condition.to(dtype=dtype))
        states = list(x_t[:, :, None].to(dtype).unbind(0))
        # In the order of the stock call, whose rounding the network multiplies by a thousand again.
        time = (self.time_scale - t.expand(len(x_t)) * self.time_scale) / self.time_scale
        outputs = network(states, time, texts, return_dict=False)[0]
        return -torch.stack(list(outputs))[:, :, 0].to(x_t.dtype)

    def feature_channels(self, network: ZImageTransformer2DModel, blocks: Sequence[int] | None) -> list[int]:
        """The width of its tokens."""
        return [network.config["dim"]] * len(self.feature_modules(network, blocks))

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Image tokens of a block as [B, D, M]; they come first, before their padding and the text."""
        return output[:, : latents[-2] // 2 * (latents[-1] // 2)].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: ZImagePipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, N, D] with their mask; Z-Image is not told the size."""
        # The stock method writes its template into the list that it is given.
        texts, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        masks = [torch.ones(len(text), dtype=torch.long, device=text.device) for text in texts]
        return Condition(pad_sequence(texts, batch_first=True), token_mask=pad_sequence(masks, batch_first=True))

    def latent_shape(
        self, pipeline: ZImagePipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w), 1024 pixels by default. Raises ValueError when a side is no multiple of a patch's pixels."""
        require_pictures(self.name, frames)
        factor = pipeline.vae_scale_factor
        height, width = pixel_size((1024, 1024), height, width, multiple=2 * factor)
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def network_time(self, t: float) -> float:
        """1 - t."""
        return 1 - t

    def call_sigmas(self, steps: int) -> list[float]:
        """Evenly down to 1 / steps, in torch's rounding."""
        return get_default_z_image_sigmas(steps)

    def shift_parameter(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
        """The stock call's, linear in the number of tokens."""
        return shift_of_tokens(scheduler, shape[-2] // 2 * (shape[-1] // 2))

    def prompt_arguments(
        self, pipeline: ZImagePipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Lists of tokens without padding."""
        found: dict[str, Any] = {"prompt_embeds": _trimmed(condition)}
        return found if null is None else {**found, "negative_prompt_embeds": _trimmed(null)}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """The stock scale s is that of c + s (c - u), on above 0: u + w (c - u) has s = w - 1."""
        return {"guidance_scale": guidance - 1}


def _trimmed(condition: Condition) -> list[Tensor]:
    assert condition.token_mask is not None
    lengths = condition.token_mask.sum(dim=1).tolist()
    return [text[:length] for text, length in zip(condition.text, lengths, strict=True)]


def require_z_image(configs: Configs) -> None:
    """Raises ValueError for a Z-Image that is told pictures (Omni), or with another scheduler."""
    require_flow_scheduler(configs["scheduler"], "Z-Image", by_size=True)
    network = configs["transformer"]
    if network.get("siglip_feat_dim") is not None or list(network.get("all_patch_size", [2])) != [2]:
        raise ValueError(
            f"the transformer has siglip_feat_dim {network.get('siglip_feat_dim')} and patches of "
            f"{network.get('all_patch_size')}: an Omni model, which is told pictures; use Z-Image, which is told text"
        )
    require_scaling(configs["vae"])
