"""The frozen many-step model that is distilled, with its prompt encoder, decoder and deterministic sampler.

Legend: B batch; latents, noise, x_t, velocity [B, C, h, w]; pixels [B, 3, H, W] in [0, 1]; t [B] canonical. Teachers of
videos have a time axis after the channels: latents [B, C, F, h, w], pixels [B, 3, frames, H, W], t [B] or [B, F].
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser, guided_velocity
from fewstep.core.families.family import network_dtype
from fewstep.core.families.table import (
    build_family,
    configs_of,
    loading_arguments,
    require_known_class,
    require_teacher,
)
from fewstep.core.networks.experts import Experts
from fewstep.core.networks.guidance_off import drop_guidance_off
from fewstep.core.networks.lora import add_lora_file, merge_lora_file
from fewstep.core.networks.other_models import load_network
from fewstep.core.networks.quantised import Quantisation, quantise
from fewstep.core.networks.shared import beside
from fewstep.core.paths import x0_from_velocity
from fewstep.core.settings import DataConfig, ModelSource, TeacherConfig
from fewstep.core.teacher_files import check_pipeline_folder, fetch, read_index, variant_of
from fewstep.core.weights import EXPERT_FOLDERS


class Teacher:
    """A diffusers pipeline whose weights never change.

    Gradients still flow through `velocity` and `x0` to their inputs, which SiD needs; put the calls under
    `torch.no_grad()` where they are not wanted.

    Attributes:
        pipeline: the stock pipeline; its modules are frozen and in eval mode.
        path: where it was loaded from, for run records.
        family: how its network is called.
        denoiser: its network in canonical coordinates.
        null_condition: what guidance leads away from, batch 1: the negative prompt, or the stock pipeline's own.

    Raises:
        ValueError: no family is known for the pipeline.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        path: str,
        negative_prompt: str | None = None,
        embedded_guidance: float | None = None,
        told_picture: bool = False,
    ) -> None:
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        require_known_class(type(pipeline).__name__)
        require_teacher(type(pipeline).__name__, configs_of(pipeline))
        self.pipeline = pipeline
        self.path = path
        family = build_family(pipeline).told_pictures() if told_picture else build_family(pipeline)
        self.negative_prompt = negative_prompt
        self.family = family if embedded_guidance is None else family.telling(embedded_guidance)
        self.denoiser = Denoiser(self.family.network(pipeline), self.family)
        # What lies under adapters of the teacher's own (`lora_apart`), where it has them.
        self._plain: Denoiser | None = None
        if negative_prompt is None:
            self.null_condition = self.family.encode_null(pipeline)
        else:
            self.null_condition = self.family.encode_prompts(pipeline, [negative_prompt])
        self.text_encoders_freed = False
        # Guidance of the expert of little noise, where it is another than that of the other.
        self.guidance_low: float | None = None
        # Of controls of a condition, see `guided_velocity`.
        self.control_guidance: float | None = None
        self._bases: dict[str, Denoiser] = {}

    @classmethod
    def of(cls, settings: TeacherConfig, *, device: torch.device) -> Teacher:
        """The teacher that the settings of a run name. Raises ValueError as `load`."""
        dtype, vae_dtype = (getattr(torch, name) for name in (settings.dtype, settings.vae_dtype))
        negative = settings.negative_prompt
        kept = settings.quantise
        apart = {"lora": None, "lora_scale": 1.0, "lora_apart": False} if settings.lora_apart else {}
        source = dataclasses.replace(settings, **apart)
        teacher = cls.load(
            source, device=device, dtype=dtype, vae_dtype=vae_dtype, quantised=kept, negative_prompt=negative
        )
        if settings.guidance_low is not None and not isinstance(teacher.denoiser.network, Experts):
            raise ValueError(
                f"teacher.guidance_low is {settings.guidance_low}, and {settings.path} has no second expert: leave it "
                "out"
            )
        teacher.guidance_low = settings.guidance_low
        if settings.lora_apart and settings.lora is not None:
            teacher._plain = teacher.denoiser
            network = beside(teacher.denoiser.network)
            add_lora_file(teacher.pipeline, network, settings.lora, scale=settings.lora_scale)
            teacher.denoiser = Denoiser(network.requires_grad_(False).to(device), teacher.family)
        return teacher

    @classmethod
    def load(
        cls,
        source: str | Path | ModelSource,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        network_dtype: torch.dtype | None = None,
        quantised: Quantisation = "none",
        negative_prompt: str | None = None,
    ) -> Teacher:
        """Load a diffusers directory or a model of the hub; safetensors alone, and no code from the model.

        Autoencoder and denoising network have `vae_dtype` and `network_dtype`, by default that of the rest; an
        autoencoder that its config says is unstable in fp16 stays in fp32. `quantised` is of the network, see
        `quantise`. `negative_prompt` None is what the stock pipeline guides with by itself.

        Raises:
            ValueError: the directory, its index or a component is missing, or no family can call it.
        """
        source = source if isinstance(source, ModelSource) else ModelSource(path=str(source))
        folder = fetch(source)
        null_components = check_pipeline_folder(folder, variant=source.variant)
        # Stock loading takes a null in the index for a missing component unless it is passed as None as well.
        vae_dtype = dtype if vae_dtype is None else vae_dtype
        if vae_dtype == torch.float16 and _is_unstable_in_half(folder):
            vae_dtype = torch.float32
        # Read in its own precision: a bf16 autoencoder that is widened afterwards has lost its digits.
        pipeline = pipeline_class(source.pipeline).from_pretrained(
            folder,
            dtype={"default": dtype, "vae": vae_dtype, **dict.fromkeys(EXPERT_FOLDERS, network_dtype or dtype)},
            use_safetensors=True,
            variant=variant_of(folder, source.variant),
            **{**dict.fromkeys(null_components), **loading_arguments(source.pipeline or class_of(folder))},
        )
        if source.lora is not None and getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError(
                f"teacher.lora {source.lora} is one file, and {source.path} has two networks: merge a LoRA into each "
                "with diffusers (load_into_transformer_2), and give the folder that save_pretrained writes"
            )
        if source.lora is not None:
            merge_lora_file(pipeline, source.lora, scale=source.lora_scale)
        for name in EXPERT_FOLDERS:
            if getattr(pipeline, name, None) is not None:
                drop_guidance_off(getattr(pipeline, name))
                quantise(getattr(pipeline, name), quantised)
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        return cls(
            pipeline,
            path=source.path,
            negative_prompt=negative_prompt,
            embedded_guidance=source.embedded_guidance,
            told_picture=source.told_picture,
        )

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | Tensor) -> Tensor:
        """Guided velocity, u + guidance (c - u) as the family combines it, fp32 at least; guidance is one or [B]."""
        combine = self.family.combine
        network = self.denoiser.network
        if self.guidance_low is not None and isinstance(network, Experts) and not isinstance(guidance, Tensor):
            # Each expert has its own.
            guidance = torch.where(network.is_high(t), guidance, self.guidance_low)
        scales = {"guidance": guidance, "combine": combine, "control_guidance": self.control_guidance}
        return guided_velocity(self.denoiser, x_t, t, condition, self.null_condition, **scales)

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition, guidance: float | Tensor) -> Tensor:
        """Guided x0 = x_t - t velocity, fp32 at least."""
        velocity = self.velocity(x_t, t, condition, guidance)
        return x0_from_velocity(x_t.to(velocity.dtype), velocity, t.to(velocity.dtype))

    def with_denoiser(self, denoiser: Denoiser) -> Teacher:
        """The same teacher with another network in its place; all other parts are shared."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    def base(self, path: str | None) -> Denoiser:
        """The frozen denoiser that a role starts from: the teacher's, or the one of another model, in the same dtype.

        Read once for all roles of a path. Raises ValueError when it cannot be read.
        """
        if path is None or path == self.path:
            return self._plain or self.denoiser
        if path not in self._bases:
            ours = (self._plain or self.denoiser).network
            dtype, device = network_dtype(ours), self.null_condition.device
            parts = {
                name: load_network(part, name, path, dtype=dtype, device=device)
                for name, part in self.family.parts(ours).items()
            }
            self._bases[path] = Denoiser(self.family.assembled(parts), self.family)
        return self._bases[path]

    def encode(
        self,
        prompts: list[str],
        *,
        height: int | None = None,
        width: int | None = None,
        pictures: Tensor | None = None,
        frames: int | None = None,
    ) -> Condition:
        """Embeddings of the prompts, without gradient. Height and width in pixels are told to SDXL alone.

        Networks that are told a picture, too, need `pictures` [B, 3, H, W] in [0, 1], one for each prompt and of the
        size of the samples, videos of `frames`; or `with_pictures` or `with_first_frames` afterwards.

        Raises:
            ValueError: the text encoders were freed, there is no prompt, or pictures are of another number or size.
        """
        if self.text_encoders_freed:
            raise ValueError(
                "the teacher's text encoders were freed after caching: encode every prompt before, or load it again"
            )
        if len(prompts) == 0:
            raise ValueError("there is no prompt to encode: give at least one, which may be empty")
        if pictures is None:
            return self.family.encode_prompts(self.pipeline, list(prompts), height=height, width=width)
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.dtype.is_floating_point:
            raise ValueError(
                f"pictures must be [B, 3, H, W] of numbers in [0, 1], got {tuple(pictures.shape)} {pictures.dtype}"
            )
        if float(pictures.min()) < 0 or float(pictures.max()) > 1:
            raise ValueError("pictures must lie in [0, 1], and some number does not: divide bytes by 255")
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures are given for {len(prompts)} prompts: give one for each")
        shape = self.latent_shape(pictures.shape[2], pictures.shape[3], frames=frames)
        shown = pictures.to(self.null_condition.device)
        with torch.no_grad():
            return self.family.encode_with_pictures(
                self.pipeline, list(prompts), shown, shape, negative_prompt=self.negative_prompt
            )

    @torch.no_grad()
    def with_pictures(self, condition: Condition, pixels: Tensor, *, frames: int | None = None) -> Condition:
        """The same that is told pictures [B, 3, H, W] in [0, 1], one for each sample, for videos of that many frames.

        Raises:
            ValueError: the network is told no picture, their size is none of its samples, or the text is encoded with
                them (`encode`).
        """
        if self.family.text_sees_picture:
            raise ValueError(f"the text encoder of {self.path} is shown the pictures: encode the prompts with them")
        shape = self.latent_shape(pixels.shape[2], pixels.shape[3], frames=frames)
        fields = self.family.picture_fields(self.pipeline, pixels.to(condition.device), shape)
        return dataclasses.replace(condition, **fields)

    @torch.no_grad()
    def with_first_frames(self, condition: Condition, latents: Tensor) -> Condition:
        """The same that is told the first frames of videos that these are latents of, where the network is told any."""
        if not self.family.takes_picture:
            return condition
        fields = self.family.first_frame_fields(self.pipeline, latents.to(condition.device))
        return dataclasses.replace(condition, **fields)

    def free_text_encoders(self) -> None:
        """Drop the text encoders to save memory; `encode` raises from now on. The tokenizers stay."""
        encoders = [name for name in self.pipeline.components if re.fullmatch(r"text_encoder(_\d+)?", name)]
        self.pipeline.register_modules(**dict.fromkeys(encoders))
        self.text_encoders_freed = True

    def free_after_setup(self, data: DataConfig) -> None:
        """Drop what a run needs no more: text encoders whose prompts are all kept, and models that were copied."""
        self._bases.clear()
        if data.cache_prompts:
            self.free_text_encoders()

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1], differentiable in the latents."""
        return self.family.decode_latents(self.pipeline, latents)

    def encode_pixels(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of pixels in [0, 1]: a draw with `generator`, the mode of the posterior without."""
        return self.family.encode_pixels(self.pipeline, pixels, generator)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, *, frames: int | None = None
    ) -> tuple[int, ...]:
        """(C, h, w) for pictures of that size in pixels, (C, F, h, w) for videos; None is the pipeline's own size.

        `frames` counts pixel frames. Raises ValueError when it is given and the teacher makes pictures.
        """
        return self.family.latent_shape(self.pipeline, height, width, frames)

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, *, steps: int, guidance: float) -> Tensor:
        """Latents by Euler steps on the pipeline's own grid, the last one to t = 0.

        Equal to the stock pipeline given these `latents`: with its FlowMatchEulerDiscreteScheduler for SD3, and for
        U-Nets with DDIM whose number of steps divides the table and whose last step ends at clean latents
        (`set_alpha_to_one`).

        Args:
            noise: [B, C, h, w], standard normal.
            condition: batch B.
            steps: network calls, at least 1.
            guidance: 1 is none.
        """
        times = self.family.teacher_grid(self.pipeline, steps, tuple(noise.shape[1:]))
        x_t = self.family.initial_state(noise, times[0])
        for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
            time = torch.full((len(x_t),), t, dtype=torch.promote_types(x_t.dtype, torch.float32), device=x_t.device)
            x_t = x_t + (t_next - t) * self.velocity(x_t, time, condition, guidance)
        return x_t


def class_of(folder: Path) -> str:
    """The class that a pipeline's index names."""
    return str(read_index(folder).get("_class_name"))


def pipeline_class(name: str | None) -> Any:
    """The class of diffusers that loads a pipeline; None is the one that its own files name.

    Raises ValueError for a name that no family is for.
    """
    if name is None:
        return DiffusionPipeline
    require_known_class(name)
    return getattr(diffusers, name)


def _is_unstable_in_half(folder: Path) -> bool:
    config = folder / "vae" / "config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("force_upcast"))
