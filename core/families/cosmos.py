"""Cosmos Predict 2.5, text to video: transformers over Wan's latents that speak rectified flow (arXiv:2511.00062).

Legend: B batch, F latent frames, N text tokens, D width of a token; latents [B, 16, F, h, w]; pixels
[B, 3, 4 (F - 1) + 1, 8 h, 8 w] in [0, 1].
"""

# diffusers annotates calls with types that are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Cosmos2_5_PredictBasePipeline, CosmosTransformer3DModel
from diffusers.pipelines.cosmos.pipeline_cosmos2_5_predict import DEFAULT_NEGATIVE_PROMPT
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size
from fewstep.core.families.parts.flow import require_flow_scheduler
from fewstep.core.families.parts.latents import latent_frames, vae_encode

STOCK_SIZE, STOCK_FRAMES, TEXT_TOKENS = (704, 1280), 93, 512


class UncheckedPrompts(nn.Module):
    """Stands for the guardrail while a model is trained and compared; it is never written into an export."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """As a pipeline asks of its modules."""
        return self.get_buffer("place").dtype

    @property
    def device(self) -> torch.device:
        """As a pipeline asks of its modules."""
        return self.get_buffer("place").device

    def check_text_safety(self, prompt: str) -> bool:
        """True."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """The frames themselves."""
        return frames


def without_guardrail() -> dict[str, Any]:
    """Components that the pipeline's constructor would else make from a package of its own."""
    return {"safety_checker": UncheckedPrompts()}


@dataclass(frozen=True)
class CosmosFamily(Family):
    """Cosmos Predict 2.5 in canonical coordinates: the network's output is the velocity, its time is t for each frame.

    Its text is all layers of a language model side by side, some 100 MB for a prompt in bf16: leave `cache_prompts` off
    for more than some hundred of them.

    Attributes:
        time_scale: the scheduler's `num_train_timesteps`.
        text_tokens: length of the text, whose padding the network attends to; a stock call needs it as
            `max_sequence_length`.
        spatial: pixels that a latent stands for.
    """

    time_scale: float
    text_tokens: int = TEXT_TOKENS
    spatial: int = 8
    name: ClassVar[str] = "cosmos"
    # A picture would come first.
    example_call: ClassVar[str] = 'prompt="a prompt"'
    makes_videos: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )

    @staticmethod
    def from_pipeline(pipeline: Cosmos2_5_PredictBasePipeline) -> CosmosFamily:
        """The family of a pipeline that `require_cosmos` lets through."""
        return CosmosFamily(
            time_scale=pipeline.scheduler.config["num_train_timesteps"],
            text_tokens=min(TEXT_TOKENS, pipeline.tokenizer.model_max_length),
            spatial=pipeline.vae_scale_factor_spatial,
        )

    def velocity(self, network: CosmosTransformer3DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time t, with no frame given. Raises ValueError for latents that are no video."""
        if x_t.ndim != 5:
            raise ValueError(f"Cosmos takes latents [B, C, F, h, w], got shape {tuple(x_t.shape)}")
        dtype, (frames, height, width) = network_dtype(network), x_t.shape[2:]
        output = network(
            hidden_states=x_t.to(dtype),
            condition_mask=x_t.new_zeros(len(x_t), 1, frames, height, width, dtype=dtype),
            timestep=t.expand(len(x_t)).view(-1, 1, 1, 1, 1).repeat(1, 1, frames, 1, 1),
            encoder_hidden_states=condition.text.to(dtype),
            padding_mask=x_t.new_zeros(1, 1, height * self.spatial, width * self.spatial, dtype=dtype),
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: Cosmos2_5_PredictBasePipeline,
        prompts: list[str],
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Condition:
        """Tokens [B, text_tokens, D] of all layers; Cosmos is not told the size."""
        tokens, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return Condition(tokens)

    def encode_null(
        self, pipeline: Cosmos2_5_PredictBasePipeline, *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """The long negative prompt of the stock pipeline."""
        return self.encode_prompts(pipeline, [DEFAULT_NEGATIVE_PROMPT])

    def encode_pixels(
        self, pipeline: Cosmos2_5_PredictBasePipeline, pixels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents [B, C, F, h, w]. Raises ValueError for pixels that are no videos of 4 k + 1 frames."""
        if pixels.ndim == 5:
            latent_frames(pixels.shape[2], factor=pipeline.vae_scale_factor_temporal)
        return vae_encode(pipeline.vae, pixels, generator, videos=True)

    def latent_shape(
        self,
        pipeline: Cosmos2_5_PredictBasePipeline,
        height: int | None,
        width: int | None,
        frames: int | None = None,
    ) -> tuple[int, int, int, int]:
        """(C, F, h, w). Raises ValueError when a side is no multiple of 16 pixels, or frames are not 4 k + 1."""
        config = pipeline.transformer.config
        height, width = pixel_size(STOCK_SIZE, height, width, multiple=max(16, self.spatial * config["patch_size"][1]))
        count = latent_frames(STOCK_FRAMES if frames is None else frames, factor=pipeline.vae_scale_factor_temporal)
        # The last channel says which frames are given.
        return config["in_channels"] - 1, count, height // self.spatial, width // self.spatial

    def network_time(self, t: float) -> float:
        """t itself."""
        return t

    def call_arguments(
        self,
        pipeline: Cosmos2_5_PredictBasePipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """Size, frames and length of the text. Raises ValueError as `latent_shape`."""
        self.latent_shape(pipeline, height, width, frames)
        rows, columns = STOCK_SIZE[0] if height is None else height, STOCK_SIZE[1] if width is None else width
        size = {"height": rows, "width": columns, "num_frames": STOCK_FRAMES if frames is None else frames}
        return size | {"max_sequence_length": self.text_tokens}

    def prompt_arguments(
        self, pipeline: Cosmos2_5_PredictBasePipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens}
        return found if null is None else {**found, "negative_prompt_embeds": null.tokens}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """The stock scale g is that of c + g (c - u), on above 1: u + w (c - u) has g = w - 1.

        Raises ValueError for w above 1 and up to 2, which the stock call has not.
        """
        if guidance == 1:
            return {"guidance_scale": 1.0}
        if not guidance > 2:
            raise ValueError(f"guidance is {guidance}; the stock call of Cosmos has none, 1, or more than 2")
        return {"guidance_scale": guidance - 1}

    def mark_student(self, pipeline: Cosmos2_5_PredictBasePipeline) -> None:
        """Leave the guardrail to those who load it: its stand-in is no part of a model."""
        pipeline.register_modules(safety_checker=None)


def require_cosmos(configs: Configs) -> None:
    """Raises ValueError for a Cosmos with another scheduler than rectified flow's, or with other inputs."""
    require_flow_scheduler(configs["scheduler"], "Cosmos Predict 2.5")
    network = configs["transformer"]
    takes, gives = network.get("in_channels", 16), network.get("out_channels", 16)
    if takes != gives + 1 or network.get("img_context_dim_in") is not None:
        raise ValueError(
            f"the transformer takes {takes} channels and gives {gives}, img_context_dim_in "
            f"{network.get('img_context_dim_in')}: it is no Cosmos Predict 2.5"
        )
