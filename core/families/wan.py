"""Wan 2.1 and 2.2 text-to-video: transformers over video latents that speak rectified flow already (arXiv:2503.20314).

Legend: B batch, F latent frames, N text tokens, D width of a token, M video tokens, P tokens of a latent frame; latents
[B, C, F, h, w]; pixels [B, 3, 4 (F - 1) + 1, H, W] in [0, 1]; t [B], or [B, F] for a time per latent frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import (
    AnyFlowPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, Sampling, network_dtype, pixel_size
from fewstep.core.families.parts.flow import require_fixed_grid
from fewstep.core.families.parts.latents import latent_frames, vae_encode
from fewstep.core.networks.experts import Experts

# Nearer to a boundary of experts than this a time would fall on either side by its rounding.
BOUNDARY_TOLERANCE = 1e-4

WanScheduler: TypeAlias = FlowMatchEulerDiscreteScheduler | UniPCMultistepScheduler

# What the stock pipeline makes when it is told no size: pixel height and width, and pixel frames.
STOCK_SIZE, STOCK_FRAMES = (480, 832), 81
# The length to which the stock pipeline pads its text with zero tokens, all of which the network attends to.
STOCK_TEXT_TOKENS = 512


@dataclass(frozen=True)
class WanFamily(Family):
    """Wan in canonical coordinates: the network's output is the velocity, its time is `time_scale` t.

    A time per frame [B, F] is told per token, as Wan 2.2 TI2V does. The networks of Wan 2.2 that were trained with a
    time per token (`expand_timesteps`) are always told it so; others are told one time when all frames share it.

    Attributes:
        time_scale: the network's time at t = 1, the scheduler's `num_train_timesteps`.
        text_tokens: length of the text; 512, or the tokenizer's `model_max_length` where that is less. A stock pipeline
            must then be called with it as `max_sequence_length`.
        time_per_token: `expand_timesteps` of the pipeline.
        boundary: of the two networks of Wan 2.2 A14B (`Experts`), `boundary_ratio` of the pipeline; None for one.
    """

    time_scale: float
    text_tokens: int = STOCK_TEXT_TOKENS
    time_per_token: bool = False
    boundary: float | None = None
    name: ClassVar[str] = "wan"
    makes_videos: ClassVar[bool] = True
    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    @staticmethod
    def from_pipeline(pipeline: WanPipeline) -> WanFamily:
        """The family of a pipeline that `require_wan` lets through."""
        return WanFamily(
            time_scale=_require_flow_scheduler(pipeline).config["num_train_timesteps"],
            text_tokens=min(STOCK_TEXT_TOKENS, pipeline.tokenizer.model_max_length),
            time_per_token=bool(pipeline.config["expand_timesteps"]),
            boundary=pipeline.config["boundary_ratio"],
        )

    def network(self, pipeline: WanPipeline) -> Any:
        """The transformer, or both as `Experts`."""
        if self.boundary is None:
            return pipeline.transformer
        return self.assembled({"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2})

    def parts(self, network: Any) -> dict[str, Any]:
        """The transformer, or both."""
        return network.parts if isinstance(network, Experts) else {"transformer": network}

    def assembled(self, parts: Mapping[str, Any]) -> Any:
        """The one of them, or both as `Experts`."""
        if self.boundary is None:
            return super().assembled(parts)
        return Experts(**parts, boundary=self.boundary, time_scale=self.time_scale)

    def blocks(self, network: Any) -> list[torch.nn.Module]:
        """The blocks of the transformer. Raises ValueError for two: a feature would be of the one or the other."""
        if isinstance(network, Experts):
            raise ValueError("features of a network of two experts would be of the one or the other: leave gan out")
        return super().blocks(network)

    def require_exportable(self, sampler: Sampling, times: Sequence[float]) -> None:
        """Raises ValueError for a time so near the boundary of two experts that rounding would choose."""
        for time in times:
            if self.boundary is not None and abs(time - self.boundary) < BOUNDARY_TOLERANCE:
                raise ValueError(
                    f"the student's time {time:g} lies on the boundary {self.boundary:g} of the teacher's two experts, "
                    "where rounding would choose between them: use another student.shift, or other student.times"
                )

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time `time_scale` t, of each sample's expert. Raises ValueError when sizes do not
        fit."""
        if isinstance(network, Experts):
            return network(self.velocity, x_t, t, condition)
        dtype = network_dtype(network)
        output = network(
            hidden_states=x_t.to(dtype),
            timestep=self._timestep(network, x_t, t),
            encoder_hidden_states=condition.text.to(dtype),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def _timestep(self, network: WanTransformer3DModel, x_t: Tensor, t: Tensor) -> Tensor:
        """[B], or [B, M] where the time differs between frames or the network was trained so."""
        depth, *patch = network.config["patch_size"]
        if x_t.ndim != 5 or x_t.shape[2] % depth or any(x % p for x, p in zip(x_t.shape[3:], patch, strict=True)):
            raise ValueError(
                f"Wan takes latents [B, C, F, h, w] whose F, h and w are multiples of its patches {(depth, *patch)}, "
                f"got shape {tuple(x_t.shape)}"
            )
        batch, _, frames, height, width = x_t.shape
        if t.ndim == 1 and not self.time_per_token:
            # Twice as many times as samples go to a network of two times.
            return t.expand(max(t.numel(), batch)) * self.time_scale
        if depth != 1 or (t.ndim == 2 and t.shape[1] != frames) or t.ndim > 2:
            raise ValueError(
                f"time must be [B], or [B, {frames}] for a network whose patches are one frame deep, got shape "
                f"{tuple(t.shape)} and depth {depth}"
            )
        per_frame = t if t.ndim == 2 else t[:, None].expand(-1, frames)
        per_token = per_frame.repeat_interleave(height // patch[0] * (width // patch[1]), dim=1)
        return per_token.expand(max(len(per_token), batch), -1) * self.time_scale

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: WanPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, text_tokens, D], zeros behind the text; Wan is not told the size."""
        tokens, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return Condition(tokens)

    def encode_pixels(self, pipeline: WanPipeline, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, C, F, h, w] at the scale of the network, fp32 at least.

        Raises:
            ValueError: the pixels are no video batch of three channels and 4 k + 1 frames.
        """
        if pixels.ndim == 5:
            latent_frames(pixels.shape[2], factor=pipeline.vae.config["scale_factor_temporal"])
        return vae_encode(pipeline.vae, pixels, generator, videos=True)

    def latent_shape(
        self, pipeline: WanPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w) of a video. Raises ValueError as `video_shape`."""
        return self.video_shape(pipeline, frames=frames, height=height, width=width)

    def video_shape(
        self, pipeline: WanPipeline, *, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w) of a video of that size; None is the stock pipeline's own 81 frames of 480 x 832.

        Raises:
            ValueError: a side is no multiple of the pixels that a patch covers (16 at least in the stock pipeline), or
                the frames are not 4 k + 1.
        """
        config, vae = self.network(pipeline).config, pipeline.vae.config
        factor, patch = vae["scale_factor_spatial"], config["patch_size"]
        # The stock pipeline insists on multiples of 16 whatever the patches are.
        multiple = max(16, factor * max(patch[1:]))
        height, width = pixel_size(STOCK_SIZE, height, width, multiple=multiple)
        count = latent_frames(STOCK_FRAMES if frames is None else frames, factor=vae["scale_factor_temporal"])
        return config["in_channels"], count, height // factor, width // factor

    def call_arguments(
        self,
        pipeline: WanPipeline | AnyFlowPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """What a call of a Wan or AnyFlow pipeline needs for videos of that many pixel frames and that size in pixels.

        Both pad the text to 512 tokens whatever the tokenizer says, and the network attends to the padding.

        Raises:
            ValueError: the frames are not 4 k + 1, or a side is not positive.
        """
        count = STOCK_FRAMES if frames is None else frames
        latent_frames(count, factor=pipeline.vae.config["scale_factor_temporal"])
        rows, columns = pixel_size(STOCK_SIZE, height, width, multiple=16)
        return {"height": rows, "width": columns, "num_frames": count, "max_sequence_length": self.text_tokens}

    def prompt_arguments(
        self, pipeline: WanPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens, as long as the network's text."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens}
        return found if null is None else {**found, "negative_prompt_embeds": null.tokens}


def anyflow_family(pipeline: AnyFlowPipeline) -> WanFamily:
    """The family by which an exported AnyFlow pipeline is called: Wan's text, sizes and latents. It is no teacher."""
    return WanFamily(
        time_scale=pipeline.scheduler.config["num_train_timesteps"],
        text_tokens=min(STOCK_TEXT_TOKENS, pipeline.tokenizer.model_max_length),
    )


def require_experts(configs: Configs) -> None:
    """Raises ValueError for a Wan that lacks one of its two networks, or the boundary between them."""
    both = "transformer" in configs and "transformer_2" in configs
    boundary = configs[""].get("boundary_ratio")
    if "transformer" not in configs or both != (boundary is not None):
        raise ValueError(
            f"this pipeline has {', '.join(name for name in ('transformer', 'transformer_2') if name in configs)} and "
            f"boundary_ratio {boundary}; one network has none, and two switch there: download all of its folders"
        )
    if boundary is not None and not 0 < boundary < 1:
        raise ValueError(f"boundary_ratio is {boundary}, and lies between 0 and 1: correct model_index.json")


def require_wan(configs: Configs) -> None:
    """Raises ValueError for a Wan that lacks a network, that is told an image, or with no flow scheduler."""
    require_experts(configs)
    scheduler = configs["scheduler"]
    network = configs["transformer"]
    takes, gives, image = network.get("in_channels", 16), network.get("out_channels", 16), network.get("image_dim")
    if takes != gives or image is not None:
        raise ValueError(
            f"the network takes {takes} channels and gives {gives}, image_dim {image}: it is told an image beside the "
            "text; use a text-to-video model"
        )
    name = str(scheduler.get("_class_name"))
    if name != "FlowMatchEulerDiscreteScheduler" and not (
        name == "UniPCMultistepScheduler" and scheduler.get("use_flow_sigmas")
    ):
        raise ValueError(_wrong_scheduler(name))
    require_fixed_grid(scheduler)


def _wrong_scheduler(name: str) -> str:
    return (
        "Wan needs a FlowMatchEulerDiscreteScheduler or a UniPCMultistepScheduler with use_flow_sigmas, this pipeline "
        f"has {name}: replace scheduler/scheduler_config.json by the original model's"
    )


def _require_flow_scheduler(pipeline: WanPipeline) -> WanScheduler:
    scheduler: Any = pipeline.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    if isinstance(scheduler, UniPCMultistepScheduler) and scheduler.config["use_flow_sigmas"]:
        return scheduler
    raise ValueError(_wrong_scheduler(type(scheduler).__name__))
