"""What the rest of the package asks of one kind of diffusers model.

Legend: B batch, C channels, N positions of a feature map; latents [B, C, h, w]; pixels [B, 3, H, W] in [0, 1]; t [B] is
canonical.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.families.parts.latents import vae_decode, vae_encode
from fewstep.core.grids import validate_grid

# Configs of a pipeline's components by name, as their JSON files have them; "" is the pipeline's own.
Configs: TypeAlias = Mapping[str, Mapping[str, Any]]
Sampling: TypeAlias = Literal["sde", "ode", "flow_map"]


class Family(Protocol):
    """How one kind of network is called in canonical coordinates, and how its pipeline encodes and decodes.

    A family holds constants of the pipeline (a noise table, a time scale) and no weights; one object serves teacher,
    fake score and student. `pipeline` and `network` are of the classes that the family is for. What is written out here
    holds for a transformer of rectified flow on pictures; a family says what is otherwise.

    Attributes:
        name: in messages and records.
        makes_videos: whether latents are [B, C, F, h, w] and t may be [B, F]; else pictures, [B, C, h, w].
        lora_targets: ends of the names of the layers that get adapters.
        takes_picture: whether the network is told a picture beside the text: the first frame, or one to edit.
        text_sees_picture: whether the text encoder is shown it, too, so that each prompt is encoded with its picture.
        block_lists: the network's lists of blocks in the order of the call.
        probe_prompts: what an export is asked for when it is compared with the training.
        example_call: what a stock call is given first, as Python.
        time_scale: the scheduler's time at t = 1.
    """

    name: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    makes_videos: ClassVar[bool] = False
    takes_picture: ClassVar[bool] = False
    text_sees_picture: ClassVar[bool] = False
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    probe_prompts: ClassVar[tuple[str, ...]] = ("a cat", "7")
    example_call: ClassVar[str] = '"a prompt"'
    time_scale: float

    # The network.

    def network(self, pipeline: Any) -> Any:
        """The denoising network of the pipeline."""
        return pipeline.transformer

    def parts(self, network: Any) -> dict[str, Any]:
        """The stock networks that it is made of, by the names that the pipeline has for them."""
        return {"transformer": network}

    def assembled(self, parts: Mapping[str, Any]) -> Any:
        """The network that is made of such parts."""
        (network,) = parts.values()
        return network

    def prepare_network(self, network: Any) -> None:
        """Change in place what `velocity` relies on; the network still works in its stock pipeline."""

    def velocity(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """eps - x0 [B, C, h, w] in the dtype of x_t, fp32 or fp64; the cast to the network's dtype is inside."""
        ...

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """The guided velocity: u + w (c - u), where w = 1 is none (arXiv:2207.12598, Eq. 6, with its w + 1)."""
        return unconditional + scale * (conditional - unconditional)

    def initial_state(self, noise: Tensor, t: float) -> Tensor:
        """The canonical state at t that stands for what the stock pipeline starts from when it is given `noise`.

        Flow pipelines do not rescale it, wherever their grid starts.
        """
        return noise

    def blocks(self, network: Any) -> list[nn.Module]:
        """The transformer blocks in the order of the call."""
        return [block for name in self.block_lists for block in getattr(network, name)]

    def feature_modules(self, network: Any, blocks: Sequence[int] | None) -> list[nn.Module]:
        """Modules whose outputs are discriminator features: the chosen blocks, by default the middle one.

        Raises ValueError when a block does not exist, or is named twice.
        """
        known = self.blocks(network)
        return [known[block] for block in chosen_blocks(blocks, len(known), default=[len(known) // 2])]

    def feature_channels(self, network: Any, blocks: Sequence[int] | None) -> list[int]:
        """C of each feature map of `feature_modules`."""
        width = network.config["num_attention_heads"] * network.config["attention_head_dim"]
        return [width] * len(self.feature_modules(network, blocks))

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Features [B, C, N] from what one of `feature_modules` gave for latents [B, *latents]."""
        return output.transpose(1, 2)

    # Text and pixels.

    def encode_prompts(
        self, pipeline: Any, prompts: list[str], *, height: int | None = None, width: int | None = None
    ) -> Condition:
        """Embeddings of the prompts; height and width in pixels matter only to networks that are told the size."""
        ...

    def encode_null(self, pipeline: Any, *, height: int | None = None, width: int | None = None) -> Condition:
        """The unconditional side of guidance in the stock pipeline when no negative prompt is given; batch 1."""
        return self.encode_prompts(pipeline, [""], height=height, width=width)

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1]."""
        return vae_decode(pipeline.vae, latents)

    def encode_pixels(self, pipeline: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents at the scale of the network: a draw with `generator`, the mode of the posterior without."""
        return vae_encode(pipeline.vae, pixels, generator)

    def latent_shape(
        self, pipeline: Any, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, ...]:
        """(C, h, w) of a picture of that size in pixels, (C, F, h, w) of a video; None is the pipeline's own size.

        Raises ValueError for a size that the pipeline cannot make, and for frames of pictures.
        """
        ...

    # Pictures that the network is told.

    def told_pictures(self) -> Family:
        """The same family whose network is told a picture besides. Raises ValueError where that is no choice."""
        reason = "always told one" if self.takes_picture else "told none"
        raise ValueError(f"told_picture is set, and networks of {self.name} are {reason}: leave it out")

    def picture_fields(self, pipeline: Any, pixels: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Fields of a condition for pictures [B, 3, H, W] in [0, 1] that a network is told, for latents [B, *shape].

        Raises ValueError where it is told none.
        """
        raise ValueError(f"pictures are given, and networks of {self.name} are told none: leave them out")

    def encode_with_pictures(
        self,
        pipeline: Any,
        prompts: list[str],
        pixels: Tensor,
        shape: tuple[int, ...],
        *,
        negative_prompt: str | None = None,
    ) -> Condition:
        """Embeddings of prompts and of a picture each, as `picture_fields` has it.

        Where the text encoder is shown the picture, the unconditional side has to be encoded with it, too: it is in the
        condition, of `negative_prompt` or the stock pipeline's own.
        """
        condition = self.encode_prompts(pipeline, prompts, height=pixels.shape[2], width=pixels.shape[3])
        return dataclasses.replace(condition, **self.picture_fields(pipeline, pixels, shape))

    def first_frame_fields(self, pipeline: Any, latents: Tensor) -> dict[str, Tensor]:
        """Fields for the first frames of videos of which there are latents; of pictures, for these themselves."""
        pixels = self.decode_latents(pipeline, latents[:, :, :1] if self.makes_videos else latents)
        first = pixels[:, :, 0] if self.makes_videos else pixels
        return self.picture_fields(pipeline, first, tuple(latents.shape[1:]))

    def picture_arguments(self, pixels: Tensor) -> dict[str, Any]:
        """Arguments of a stock call that is told the picture [1, 3, H, W], one for all its prompts."""
        return {}

    # Times.

    @property
    def last_timestep(self) -> float:
        """The largest timestep, in the units of settings that name timesteps."""
        return self.time_scale

    def flow_time(self, timestep: Tensor) -> Tensor:
        """The canonical time of such a timestep."""
        return timestep / self.time_scale

    def network_time(self, t: float) -> float:
        """What the network is called with at the canonical time t."""
        return self.time_scale * t

    def call_sigmas(self, steps: int) -> list[float] | None:
        """The sigmas that a stock call without any hands to its scheduler; None where it hands on the number of steps.
        The scheduler shifts them still."""
        return None

    def shift_parameter(self, scheduler: Any, shape: tuple[int, ...], steps: int) -> float:
        """`mu` of a stock call for latents of this shape, where the scheduler shifts by the size."""
        raise ValueError(f"pipelines of {self.name} hand no size to their scheduler; set use_dynamic_shifting to false")

    def set_timesteps(
        self, scheduler: Any, steps: int, *, shape: tuple[int, ...] | None = None, sigmas: Sequence[float] | None = None
    ) -> None:
        """What a stock call does to its scheduler, for latents of this shape, and with `sigmas` as its argument."""
        own = self.call_sigmas(steps) if sigmas is None else list(sigmas)
        arguments: dict[str, Any] = {"num_inference_steps": steps} if own is None else {"sigmas": own}
        if scheduler.config.get("use_dynamic_shifting"):
            if shape is None:
                raise ValueError("a scheduler that shifts by the size needs the shape of the latents")
            arguments["mu"] = self.shift_parameter(scheduler, shape, steps)
        scheduler.set_timesteps(**arguments)

    def teacher_grid(self, pipeline: Any, steps: int, shape: tuple[int, ...] | None = None) -> tuple[float, ...]:
        """Canonical times at which the pipeline's own deterministic sampler calls the network; the final 0 left out.

        `shape` is that of the latents, None the pipeline's own. With FlowMatchEuler an Euler sampler on these times is
        the stock sampler; a solver of higher order steps on them with another rule, so that Euler needs more steps for
        the same accuracy.
        """
        scheduler: Any = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        own = self.latent_shape(pipeline, None, None) if shape is None else shape
        self.set_timesteps(scheduler, steps, shape=own)
        times = tuple(torch.as_tensor(scheduler.sigmas)[:-1].tolist())
        validate_grid(times)
        return times

    def full_size(self, pipeline: Any, height: int | None, width: int | None, *, factor: int) -> dict[str, int]:
        """Height and width in pixels, the pipeline's own where they are not given; a latent has `factor` to a side."""
        sides = self.latent_shape(pipeline, height, width)[-2:]
        return dict(zip(("height", "width"), (side * factor for side in sides), strict=True))

    # An embedded guidance.

    def has_guidance_embedding(self, network: Any) -> bool:
        """Whether the network is told the guidance of the run (SANA-Sprint), which is then in every call."""
        return False

    @property
    def told_guidance(self) -> float | None:
        """The scale that `encode_prompts` puts into its conditions, None where the network is told none.

        It is `embedded_guidance` of families whose networks are.
        """
        return getattr(self, "embedded_guidance", None)

    def telling(self, guidance: float) -> Any:
        """The same family that tells the network another guidance. Raises ValueError where it is told none."""
        if self.told_guidance is not None:
            own: Any = self
            return dataclasses.replace(own, embedded_guidance=guidance)
        raise ValueError(
            f"embedded_guidance is {guidance}, and networks of {self.name} have no embedding of it: leave it out; "
            "guidance is the scale of two calls"
        )

    # The stock call.

    def call_arguments(
        self, pipeline: Any, *, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> dict[str, Any]:
        """What a stock call needs, beside prompts, guidance and steps, to make samples of that size as the network was
        trained. `pipeline` may also be of another class that students of this family are exported to.
        """
        require_pictures(self.name, frames)
        return given(height=height, width=width)

    def text_arguments(self, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
        """Arguments of a stock call for these prompts; `guided` where it makes a second call without them."""
        return {"prompt": list(prompts)}

    def prompt_arguments(self, pipeline: Any, condition: Condition, null: Condition | None) -> dict[str, Any] | None:
        """Arguments of a stock call in place of the prompts that `condition` was encoded from; `null` [B] is given
        where the call guides. None: this pipeline is called with its texts."""
        return None

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """Arguments of a stock call at u + guidance (c - u), which for 1 must not make a second call."""
        return {"guidance_scale": guidance}

    def latent_arguments(self, pipeline: Any, latents: Tensor, seed: int | Sequence[int]) -> dict[str, Any]:
        """Arguments of a stock call that starts from these canonical latents; where it takes none, from what a CPU
        generator of `seed` draws, or one of each seed for each sample."""
        return {"latents": self.stock_latents(pipeline, latents).clone()}

    def latent_call(self, pipeline: Any, arguments: Mapping[str, Any]) -> Tensor:
        """The latents that a stock call makes, as it gives them."""
        return pipeline(**arguments, output_type="latent", return_dict=False)[0]

    def stock_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """What a stock call takes as `latents` for these canonical ones, such as packed patches."""
        return latents

    def stock_state(self, pipeline: Any, latents: Tensor) -> Tensor:
        """What the scheduler of a stock call steps on, for these canonical latents; noise is drawn in its shape."""
        return self.stock_latents(pipeline, latents)

    def canonical_latents(self, pipeline: Any, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Canonical latents [B, *shape] of what a stock call gives as latents, or of its state."""
        return latents

    def require_exportable(self, sampler: Sampling, times: Sequence[float]) -> None:
        """Raises ValueError, before a training, for a student that no stock call of this family steps as trained."""

    def mark_student(self, pipeline: Any) -> None:
        """Change in place what a stock pipeline has to say of itself where its network is a few-step student."""

    def stand_ins(self, pipeline: Any, absent: tuple[str, ...]) -> dict[str, Any]:
        """A component for each of these that are None, with which the pipeline does exactly what it does without.

        Raises ValueError where there is no such component.
        """
        return no_stand_ins(pipeline, absent)


def chosen_blocks(blocks: Sequence[int] | None, count: int, *, default: Sequence[int]) -> list[int]:
    """The numbers of the chosen blocks. Raises ValueError when one does not exist, or is named twice."""
    chosen = list(default if blocks is None else blocks)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= block < count for block in chosen):
        raise ValueError(f"the discriminator's blocks must be distinct numbers from 0 to {count - 1}, got {chosen}")
    return chosen


def require_pictures(name: str, frames: int | None) -> None:
    """Raises ValueError for frames of a family that makes pictures."""
    if frames is not None:
        raise ValueError(f"frames is {frames}, and a teacher of the family {name} makes pictures")


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
