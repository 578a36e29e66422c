"""What the rest of the package asks of one kind of diffusers model, and the latent scaling that all kinds share.

Legend: B batch, C channels, N positions of a feature map; latents [B, C, h, w]; pixels [B, 3, H, W] in [0, 1]; t [B] is
canonical.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from fewstep.core.condition import Condition

# Configs of a pipeline's components by name, as their JSON files have them; "" is the pipeline's own.
Configs: TypeAlias = Mapping[str, Mapping[str, Any]]


class Family(Protocol):
    """How one kind of network is called in canonical coordinates, and how its pipeline encodes and decodes.

    A family holds constants of the pipeline (a noise table, a time scale) and no weights; one object serves teacher,
    fake score and student. `pipeline` and `network` are of the classes that the family is for.
    """

    @property
    def name(self) -> str: ...

    @property
    def makes_videos(self) -> bool:
        """Whether latents are [B, C, F, h, w] and t may be [B, F]; else pictures, [B, C, h, w]."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Ends of the names of the layers that get adapters."""
        ...

    def network(self, pipeline: Any) -> nn.Module:
        """The denoising network of the pipeline."""
        ...

    def prepare_network(self, network: Any) -> None:
        """Change in place what `velocity` relies on; the network still works in its stock pipeline."""
        ...

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps - x0 [B, C, h, w] in the dtype of x_t, fp32 or fp64; the cast to the network's dtype is inside."""
        ...

    def initial_state(self, noise: Tensor, t: float) -> Tensor:
        """The canonical state at t that stands for what the stock pipeline starts from when it is given `noise`."""
        ...

    def feature_modules(self, network: Any, blocks: Sequence[int] | None) -> list[nn.Module]:
        """Modules whose outputs are discriminator features; `blocks` None picks the family's own."""
        ...

    def feature_channels(self, network: Any, blocks: Sequence[int] | None) -> list[int]:
        """C of each feature map of `feature_modules`."""
        ...

    def feature_map(self, output: Any) -> Tensor:
        """Features [B, C, N] from the output of one of `feature_modules`."""
        ...

    def encode_prompts(
        self, pipeline: Any, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Embeddings of the prompts; height and width in pixels matter only to networks that are told the size."""
        ...

    def encode_null(self, pipeline: Any, *, height: int | None = None, width: int | None = None) -> Condition:
        """The unconditional side of guidance in the stock pipeline when no negative prompt is given; batch 1."""
        ...

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1]."""
        ...

    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents at the scale of the network: a draw with `generator`, the mode of the posterior without."""
        ...

    def latent_shape(
        self, pipeline: Any, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, ...]:
        """(C, h, w) of a picture of that size in pixels, (C, F, h, w) of a video; None is the pipeline's own size.

        Raises ValueError for a size that the pipeline cannot make, and for frames of pictures.
        """
        ...

    @property
    def last_timestep(self) -> float:
        """The largest timestep that the network knows."""
        ...

    def flow_time(self, timestep: Tensor) -> Tensor:
        """The canonical time of a timestep in the network's own units."""
        ...

    def teacher_grid(self, pipeline: Any, steps: int) -> tuple[float, ...]:
        """Canonical times at which the pipeline's own deterministic sampler calls the network; the final 0 left out."""
        ...

    def has_guidance_embedding(self, network: Any) -> bool:
        """Whether the network is called with a guidance scale (`condition.guidance`), which is then in every call."""
        ...

    def call_arguments(
        self, pipeline: Any, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """What a stock call needs, beside prompts and steps, to make samples of that size as the network was trained.

        `pipeline` may also be of another class that students of this family are exported to.
        """
        ...

    def prompt_arguments(self, pipeline: Any, condition: Condition, null: Condition | None) -> dict[str, Any] | None:
        """Arguments of a stock call in place of the prompts that `condition` was encoded from; `null` [B] is given
        where the call guides. None: this pipeline is called with its texts."""
        ...

    def stock_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """What a stock call takes as `latents` for these canonical ones, such as packed patches."""
        ...

    def canonical_latents(self, pipeline: Any, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Canonical latents [B, *shape] of what a stock call gives with output_type "latent"."""
        ...

    def stand_ins(self, pipeline: Any, absent: tuple[str, ...]) -> dict[str, Any]:
        """A component for each of these that are None, with which the pipeline does exactly what it does without.

        Raises ValueError where there is no such component.
        """
        ...


def require_pictures(name: str, frames: int | None) -> None:
    """Raises ValueError for frames of a family that makes pictures."""
    if frames is not None:
        raise ValueError(f"frames is {frames}, and a teacher of the family {name} makes pictures")


def require_scaling(vae: Mapping[str, Any]) -> None:
    """Raises ValueError for an autoencoder whose latents have no scale."""
    if "scaling_factor" in vae and not vae["scaling_factor"]:
        raise ValueError(
            f"the autoencoder's scaling_factor is {vae['scaling_factor']}, which leaves nothing of its latents: "
            "correct vae/config.json, as the original model has it"
        )


def require_fixed_grid(scheduler: Mapping[str, Any]) -> None:
    """Raises ValueError for a flow scheduler whose times do not follow from the number of steps alone."""
    if any(scheduler.get(name) for name in ("use_dynamic_shifting", "stochastic_sampling", "invert_sigmas")):
        raise ValueError(
            "the teacher's scheduler must have use_dynamic_shifting, stochastic_sampling and invert_sigmas off, so "
            "that its grid follows from the steps alone: set a fixed shift in scheduler/scheduler_config.json"
        )
    shift = scheduler.get("shift", 1.0)
    if shift is None or not shift > 0:
        raise ValueError(f"the teacher's scheduler has the shift {shift}, and it must be positive")


def given(**values: Any) -> dict[str, Any]:
    """The arguments that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def no_stand_ins(pipeline: Any, absent: tuple[str, ...]) -> dict[str, Any]:
    """For families that know none: nothing for nothing. Raises ValueError that names what is absent."""
    if absent:
        raise ValueError(
            f"the teacher ({type(pipeline).__name__}) has no {', '.join(absent)}, and its class cannot be loaded "
            "without. Give the teacher these components, or export with lora_only."
        )
    return {}


def network_dtype(network: nn.Module) -> torch.dtype:
    """The dtype in which a network computes: that of most of its floating weights.

    Not that of the first: diffusers keeps some layers of a half-precision network in fp32 (norms, time embeddings and
    tables, `_keep_in_fp32_modules`). Adapters do not count: they are fp32 on whatever they sit, and of a high rank they
    may outnumber the weights under them.

    Raises:
        ValueError: the network has no floating weights.
    """
    counts: dict[torch.dtype, int] = {}
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    if not counts:
        raise ValueError(f"{type(network).__name__} has no floating parameter, so it has no dtype to call it in")
    return max(counts, key=lambda dtype: counts[dtype])


def _scale_and_shift(vae: AutoencoderKL, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(a, b) with raw = a latents + b, as the stock pipelines have it: per channel where the config has statistics."""
    config = vae.config
    mean, std = config["latents_mean"], config["latents_std"]
    if mean is None or std is None:
        return 1 / config["scaling_factor"], config["shift_factor"] or 0.0
    view = (1, -1, 1, 1)
    std, mean = (torch.as_tensor(values).to(latents).view(view) for values in (std, mean))
    return std / config["scaling_factor"], mean


def vae_decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels [B, 3, H, W] in [0, 1], fp32 at least, from latents at the scale of the network."""
    scale, shift = _scale_and_shift(vae, latents)
    raw = (latents * scale + shift).to(vae.dtype)
    pixels = vae.decode(raw, return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    return (pixels.to(torch.promote_types(pixels.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def vae_encode(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Latents at the scale of the network, fp32 at least, from pixels [B, 3, H, W] in [0, 1].

    Raises:
        ValueError: the pixels are no picture batch of three channels.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be [B, 3, H, W], got shape {tuple(pixels.shape)}")
    posterior = vae.encode((pixels * 2 - 1).to(vae.dtype), return_dict=False)[0]
    raw = posterior.mode() if generator is None else posterior.sample(generator)
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    scale, shift = _scale_and_shift(vae, raw)
    return (raw - shift) / scale


def pixel_size(default: tuple[int, int], height: int | None, width: int | None, *, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels with the default filled in.

    Raises:
        ValueError: one is not a positive multiple of `multiple`.
    """
    size = (default[0] if height is None else height, default[1] if width is None else width)
    for name, value in zip(("height", "width"), size, strict=True):
        if value < 1 or value % multiple:
            raise ValueError(f"{name} must be a positive multiple of {multiple} pixels for this model, got {value}")
    return size
