"""Stable Diffusion 1.5 and XL: U-Nets that predict eps or v on a DDPM noise table.

Legend: B batch, N text tokens, T length of the table. The state of the table's path is x = alpha x0 + sigma eps with
alpha^2 + sigma^2 = 1; the canonical state is x_t = x / (alpha + sigma) at t = sigma / (alpha + sigma).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.families.autoencoder import require_scaling
from fewstep.core.families.family import Configs, Family, network_dtype, pixel_size, require_pictures
from fewstep.core.grids import validate_grid
from fewstep.core.paths import VariancePreserving, expand_time, from_flow_state

UnetPipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline

# An fp32 t fixes the timestep to about 1e-4 near the noisy end; what lies this close to an integer was meant to be it.
INDEX_ROUNDING = 1e-3
# Stands for the zero at the end of a table with zero terminal SNR: alpha is 1e-8 there, which fp32 does not see beside
# the zero that stock DDIM and LCM compute with. (EulerDiscreteScheduler's own stand-in, 2^-24, is 2.4e-4 off.)
SMALLEST_ALPHAS_CUMPROD = 1e-16
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class UnetFamily(Family):
    """A U-Net on a noise table in canonical coordinates.

    The table ends at `last_time` < 1 (0.936 for Stable Diffusion), while a student starts at t = 1. Beyond the table
    the network gets the last timestep and an input of the norm that the path has at t, and its output is read with the
    table's last alpha and sigma: x0 = (x - sigma eps) / alpha, velocity = (x_t - x0) / t. At t = 1 this is the one-step
    rule of DMD2 (arXiv:2405.14867, Sec. 4): unit noise enters at the last timestep. At `last_time` it meets the exact
    conversion continuously. Before the table's first time only the timestep is clamped.

    Attributes:
        path: the noise table.
        prediction: what the network predicts: "epsilon" or "v_prediction" (v = alpha eps - sigma x0, arXiv:2202.00512).
        time_scale: length of the table.
        has_size_condition: whether pooled text and six size numbers are given to the network, as in SDXL.
    """

    path: VariancePreserving
    prediction: Literal["epsilon", "v_prediction"]
    has_size_condition: bool
    time_scale: float = field(init=False)
    name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_scale", float(len(self.path.alphas_cumprod)))

    @staticmethod
    def from_pipeline(pipeline: UnetPipeline) -> UnetFamily:
        """The family of a pipeline that `require_unet` lets through, with the noise table of its scheduler's config."""
        prediction = pipeline.scheduler.config["prediction_type"]
        kind = pipeline.unet.config.addition_embed_type
        return UnetFamily(noise_table(pipeline.scheduler), prediction, has_size_condition=kind == "text_time")

    @property
    def last_time(self) -> float:
        """The canonical time of the table's last entry."""
        return self.path.flow_time_range[1]

    def network(self, pipeline: UnetPipeline) -> UNet2DConditionModel:
        return pipeline.unet

    def parts(self, network: UNet2DConditionModel) -> dict[str, Any]:
        """The U-Net."""
        return {"unet": network}

    def velocity(self, network: UNet2DConditionModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See the class. Raises ValueError when an SDXL condition lacks pooled text or time_ids."""
        t = t.expand(x_t.shape[0])
        x, time = from_flow_state(self.path, x_t, t)
        dtype = network_dtype(network)
        output = network(
            x.to(dtype),
            snap_to_integer(time),
            encoder_hidden_states=condition.text.to(dtype),
            added_cond_kwargs=self._size_condition(condition, dtype),
            return_dict=False,
        )[0].to(x_t.dtype)
        last = self.last_time
        on_table = t.clamp(max=last)
        scale = self.path.scale_at_flow_time(on_table)
        alpha, sigma = expand_time((1 - on_table) * scale, x), expand_time(on_table * scale, x)
        if self.prediction == "epsilon":
            eps, x0 = output, (x - sigma * output) / alpha
        else:
            eps, x0 = sigma * x + alpha * output, alpha * x - sigma * output
        # The clamp keeps the branch that is not taken finite, and with it the gradient of torch.where.
        beyond = (x_t - x0) / expand_time(t.clamp(min=last), x)
        return torch.where(expand_time(t, x) <= last, eps - x0, beyond)

    def initial_state(self, noise: Tensor, t: float) -> Tensor:
        """noise / (alpha + sigma): the stock pipeline feeds unit noise at whichever timestep its grid starts."""
        time = torch.tensor([t], dtype=torch.float64)
        return noise / float(self.path.scale_at_flow_time(time))

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

    @property
    def last_timestep(self) -> float:
        """That of the noise table."""
        return len(self.path.alphas_cumprod) - 1

    def flow_time(self, timestep: Tensor) -> Tensor:
        """That of the noise table."""
        return self.path.to_flow_time(timestep)

    def teacher_grid(
        self, pipeline: UnetPipeline, steps: int, shape: tuple[int, ...] | None = None
    ) -> tuple[float, ...]:
        """Times of DDIM (arXiv:2010.02502) with the timestep spacing of the pipeline's scheduler.

        A deterministic DDIM step is an Euler step here: x_t = x0 + t (eps - x0) is affine in t for fixed x0 and eps.
        """
        scheduler = _ddim_scheduler(pipeline)
        scheduler.set_timesteps(steps)
        times = tuple(self.path.to_flow_time(scheduler.timesteps.double()).tolist())
        validate_grid(times)
        return times

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
    name, prediction = str(scheduler.get("_class_name")), scheduler.get("prediction_type", "epsilon")
    if name.startswith("EDM") or "beta_schedule" not in scheduler:
        raise ValueError(
            f"the scheduler is a {name}, and the U-Nets here walk a DDPM table of betas: use another model"
        )
    if name in FEW_STEP_SCHEDULERS:
        raise ValueError(
            f"the scheduler is a {name}, which samples a few-step student: use the model that it was distilled from"
        )
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler's prediction_type must be epsilon or v_prediction, got {prediction!r}")
    if scheduler.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise ValueError(
            "the noise table has zero terminal SNR, where an eps prediction says nothing about x0: set "
            "rescale_betas_zero_snr to false, or prediction_type to v_prediction if the network predicts v"
        )
    require_scaling(configs["vae"])


def snap_to_integer(time: Tensor) -> Tensor:
    """Timesteps within `INDEX_ROUNDING` of an integer as that integer; others as given, for the network takes both."""
    nearest = time.round()
    # The move to the integer is a constant: the derivative with respect to time goes through.
    return torch.where((time - nearest).abs() < INDEX_ROUNDING, time + (nearest - time).detach(), time)


def noise_table(scheduler: Any) -> VariancePreserving:
    """The path of a scheduler's noise table, which does not depend on the scheduler's class."""
    table = DDIMScheduler.from_config(scheduler.config).alphas_cumprod  # pyright: ignore[reportAttributeAccessIssue]
    return VariancePreserving(table.double().clamp(min=SMALLEST_ALPHAS_CUMPROD))


def _ddim_scheduler(pipeline: UnetPipeline) -> DDIMScheduler:
    """DDIM on the noise table of the pipeline's scheduler, of whatever class that is."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert isinstance(scheduler, DDIMScheduler)
    return scheduler
