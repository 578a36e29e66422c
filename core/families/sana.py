"""SANA: linear-attention transformers that speak rectified flow (arXiv:2410.10629), and SANA-Sprint (arXiv:2503.09641).

Legend: B batch, N text tokens, D width of a token, M image tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.family import (
    Configs,
    Family,
    chosen_blocks,
    network_dtype,
    pixel_size,
    require_pictures,
)
from fewstep.core.families.parts.flow import require_fixed_grid
from fewstep.core.families.parts.latents import require_scaling

AnySanaPipeline = SanaPipeline | SanaSprintPipeline
# Blocks whose outputs SANA-Sprint's discriminator reads, of the 20 that its network has (arXiv:2503.09641).
SPRINT_BLOCKS, SPRINT_DEPTH = (2, 8, 14, 19), 20


@dataclass(frozen=True)
class SanaFamily(Family):
    """SANA in canonical coordinates: the network's output is the velocity.

    A SanaPipeline calls its network at 1000 t times the network's `timestep_scale`; 0.001 there is the dense time
    embedding of SANA-Sprint, which sees t. SanaSprintPipeline works in TrigFlow, and around its network converts to
    rectified flow and back: the network itself gives the velocity at t.

    Attributes:
        time_scale: the network's time at t = 1.
        sprint: states start as SanaSprintPipeline starts them.
    """

    time_scale: float
    sprint: bool = False
    name: ClassVar[str] = "sana"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "conv_inverted",
        "conv_point",
    )

    @staticmethod
    def from_pipeline(pipeline: AnySanaPipeline) -> SanaFamily:
        """The family of a pipeline. Raises ValueError when its scheduler is of another kind or is no flow scheduler."""
        if isinstance(pipeline, SanaSprintPipeline):
            if not isinstance(pipeline.scheduler, SCMScheduler):
                raise ValueError(f"SANA-Sprint needs an SCMScheduler, this pipeline has {type(pipeline.scheduler)}")
            return SanaFamily(time_scale=1.0, sprint=True)
        scheduler: Any = _require_flow_scheduler(pipeline)
        # In this order 1000 * 0.001 is exactly 1.
        scale = scheduler.config["num_train_timesteps"] * pipeline.transformer.config["timestep_scale"]
        return SanaFamily(time_scale=float(scale))

    def velocity(self, network: SanaTransformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time `time_scale` t, its first half where it learnt a variance too.

        A network with a guidance embedding is told `condition.guidance` times its `guidance_embeds_scale`; others do
        not look at it.

        Raises:
            ValueError: the condition has no token mask, or no guidance where the network has an embedding of it.
        """
        if condition.token_mask is None:
            raise ValueError("SANA needs a mask of its text tokens, and the condition has none: encode with its family")
        dtype = network_dtype(network)
        guidance = None
        if network.config["guidance_embeds"]:
            if condition.guidance is None:
                raise ValueError(
                    "this network has a guidance embedding, and the condition has no guidance: "
                    "dataclasses.replace(condition, guidance=...) with a scale for each sample"
                )
            guidance = condition.guidance.to(t) * network.config["guidance_embeds_scale"]
        output = network(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=condition.text.to(dtype),
            timestep=t.expand(x_t.shape[0]) * self.time_scale,
            guidance=guidance,
            encoder_attention_mask=condition.token_mask,
            return_dict=False,
        )[0]
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def initial_state(self, noise: Tensor, t: float) -> Tensor:
        """The noise itself for SanaPipeline; SANA-Sprint takes it for the TrigFlow state, sqrt(t^2 + (1 - t)^2) noise.

        The square root is 1 / Z of TrigFlow's change of coordinates. At t = 1 both are the noise.
        """
        return noise * (t**2 + (1 - t) ** 2) ** 0.5 if self.sprint else noise

    def feature_modules(self, network: SanaTransformer2DModel, blocks: Sequence[int] | None) -> list[torch.nn.Module]:
        """The chosen transformer blocks, by default SANA-Sprint's (2, 8, 14, 19 of 20), at that relative depth.

        Raises:
            ValueError: a block does not exist, or is named twice.
        """
        known = self.blocks(network)
        own = sorted({round(block * (len(known) - 1) / (SPRINT_DEPTH - 1)) for block in SPRINT_BLOCKS})
        return [known[block] for block in chosen_blocks(blocks, len(known), default=own)]

    @torch.no_grad()
    def encode_prompts(
        self, pipeline: AnySanaPipeline, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Tokens [B, N, D] with their mask, behind the stock pipeline's instruction to its language model.

        Tokens that are padding in the whole batch are left out: attention gives them no weight. SANA is not told the
        size.
        """
        return _encode(pipeline, prompts, instruction=_call_default(pipeline, "complex_human_instruction"))

    @torch.no_grad()
    def encode_null(
        self, pipeline: AnySanaPipeline, *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """The empty prompt without the instruction, as the stock pipeline encodes its negative prompt."""
        return _encode(pipeline, [""], instruction=None)

    def decode_latents(self, pipeline: AnySanaPipeline, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1], fp32 at least."""
        vae: AutoencoderDC = pipeline.vae
        raw = (latents / vae.config["scaling_factor"]).to(vae.dtype)
        pixels = vae.decode(raw, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
        return (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)

    def encode_pixels(
        self, pipeline: AnySanaPipeline, pixels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents at the scale of the network. The autoencoder is deterministic: nothing is drawn from `generator`.

        Raises:
            ValueError: the pixels are no picture batch of three channels.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B, 3, H, W], got shape {tuple(pixels.shape)}")
        vae: AutoencoderDC = pipeline.vae
        raw = vae.encode((pixels * 2 - 1).to(vae.dtype), return_dict=False)[0]
        return raw.to(torch.promote_types(raw.dtype, torch.float32)) * vae.config["scaling_factor"]

    def latent_shape(
        self, pipeline: AnySanaPipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError when a side is no multiple of 32 pixels, which the stock pipelines ask for."""
        require_pictures(self.name, frames)
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        side = config["sample_size"] * factor
        height, width = pixel_size((side, side), height, width, multiple=max(32, factor * config["patch_size"]))
        return config["in_channels"], height // factor, width // factor

    def teacher_grid(
        self, pipeline: AnySanaPipeline, steps: int, shape: tuple[int, ...] | None = None
    ) -> tuple[float, ...]:
        """The sigmas of the pipeline's own scheduler.

        Of a DPM-Solver with flow sigmas these are its times; its own steps are of second order, so that a teacher's
        Euler steps on them equal it for `solver_order` 1 alone. Raises ValueError for SANA-Sprint.
        """
        if self.sprint:
            raise ValueError("SANA-Sprint is a few-step student and has no grid of a teacher: distil a SanaPipeline")
        return super().teacher_grid(pipeline, steps, shape)

    def has_guidance_embedding(self, network: Any) -> bool:
        """Whether it is a network of SANA-Sprint."""
        return isinstance(network, SanaTransformer2DModel) and bool(network.config["guidance_embeds"])

    def call_arguments(
        self,
        pipeline: AnySanaPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> dict[str, Any]:
        """The size in pixels, without binning.

        SANA's own default is 1024 pixels whatever its network was made for, and binning moves the size to one of a
        table that knows four sizes of networks.

        Raises:
            ValueError: see `latent_shape`.
        """
        _, rows, columns = self.latent_shape(pipeline, height, width, frames)
        factor = pipeline.vae_scale_factor
        return {"height": rows * factor, "width": columns * factor, "use_resolution_binning": False}

    def prompt_arguments(
        self, pipeline: AnySanaPipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens with their mask; SANA-Sprint does not guide by a second prompt."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens, "prompt_attention_mask": condition.token_mask}
        if null is None or self.sprint:
            return found
        found |= {"negative_prompt_embeds": null.tokens, "negative_prompt_attention_mask": null.token_mask}
        # SANA's own default is an empty text, which it takes for a second one beside the embeddings.
        return {**found, "negative_prompt": None}


def _call_default(pipeline: AnySanaPipeline, name: str) -> Any:
    """What the pipeline's call takes for an argument that is not given."""
    return inspect.signature(pipeline.__call__).parameters[name].default


def _encode(pipeline: AnySanaPipeline, prompts: list[str], *, instruction: list[str] | None) -> Condition:
    length = _call_default(pipeline, "max_sequence_length")
    if isinstance(pipeline, SanaSprintPipeline):
        tokens, mask = pipeline.encode_prompt(
            prompts, max_sequence_length=length, complex_human_instruction=instruction
        )
    else:
        tokens, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            complex_human_instruction=instruction,
        )
    assert tokens is not None
    # A text without any token attends to all of its padding alike, so nothing may be left out then.
    used = int(mask.any(dim=0).nonzero().max()) + 1 if mask.any(dim=1).all() else mask.shape[1]
    return Condition(tokens[:, :used], token_mask=mask[:, :used])


def require_sana(configs: Configs) -> None:
    """Raises ValueError for a SANA whose scheduler walks no rectified flow at fixed times."""
    scheduler = configs["scheduler"]
    name = str(scheduler.get("_class_name"))
    solver = name == "DPMSolverMultistepScheduler" and scheduler.get("use_flow_sigmas")
    if name == "SCMScheduler":
        return
    if name != "FlowMatchEulerDiscreteScheduler" and not (
        solver and scheduler.get("prediction_type") == "flow_prediction"
    ):
        raise ValueError(_wrong_scheduler(name))
    require_fixed_grid(scheduler)
    require_scaling(configs["vae"])


def _wrong_scheduler(name: str) -> str:
    return (
        f"SANA needs a FlowMatchEulerDiscreteScheduler, or a DPMSolverMultistepScheduler with use_flow_sigmas and "
        f"prediction_type flow_prediction; this pipeline has {name} without: replace "
        "scheduler/scheduler_config.json by the original model's"
    )


def _require_flow_scheduler(pipeline: AnySanaPipeline) -> FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler:
    scheduler: Any = pipeline.scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        config = scheduler.config
        if config["use_flow_sigmas"] and config["prediction_type"] == "flow_prediction":
            return scheduler
    raise ValueError(_wrong_scheduler(type(scheduler).__name__))
