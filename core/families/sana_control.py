"""SANA with a ControlNet, which follows a picture such as an edge map (arXiv:2302.05543; arXiv:2503.09641, Sec. 4).

Legend: B batch; x_t, control [B, C, h, w]; t [B].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.families.family import network_dtype
from fewstep.core.families.sana import SanaFamily
from fewstep.core.grids import step_grid


class ControlledSana(nn.Module):
    """A SANA transformer and its ControlNet as one network, each in its stock class.

    Args:
        transformer: a SANA transformer without guidance embedding.
        controlnet: what reads the control picture, with the transformer's width.
    """

    def __init__(self, transformer: SanaTransformer2DModel, controlnet: SanaControlNetModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.controlnet = controlnet

    @property
    def parts(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "controlnet": self.controlnet}

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The attention processors of both, by the names of their modules here."""
        return {
            f"{part}.{name}": processor
            for part, network in self.parts.items()
            for name, processor in network.attn_processors.items()
        }

    def set_attn_processor(self, processors: Mapping[str, Any]) -> None:
        """Set the processors of both; the keys are those of `attn_processors`."""
        for part, network in self.parts.items():
            own = {name.removeprefix(f"{part}."): p for name, p in processors.items() if name.startswith(f"{part}.")}
            network.set_attn_processor(own)

    def enable_gradient_checkpointing(self) -> None:
        for network in self.parts.values():
            network.enable_gradient_checkpointing()

    def forward(
        self, x_t: Tensor, timestep: Tensor, tokens: Tensor, token_mask: Tensor, control: Tensor
    ) -> tuple[Tensor]:
        """The velocity [B, C, h, w], alone in a tuple as from a stock network."""
        text: dict[str, Any] = {"encoder_hidden_states": tokens, "encoder_attention_mask": token_mask}
        residuals = self.controlnet(x_t, timestep=timestep, controlnet_cond=control, return_dict=False, **text)[0]
        velocity = self.transformer(
            x_t, timestep=timestep, controlnet_block_samples=tuple(residuals), return_dict=False, **text
        )[0]
        return (velocity,)


@dataclass(frozen=True)
class SanaControlFamily(SanaFamily):
    """SanaControlNetPipeline in canonical coordinates: both networks are called at `time_scale` t.

    The pipeline gives its networks what the scheduler says, whatever the transformer's `timestep_scale` is. So a
    network with dense time has a scheduler of `num_train_timesteps` 1, which knows no grid of its own: the pipeline is
    then called with `sigmas`.
    """

    name: ClassVar[str] = "sana_control"

    @staticmethod
    def from_pipeline(pipeline: SanaControlNetPipeline) -> SanaControlFamily:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The family of a pipeline.

        Raises:
            ValueError: its scheduler is no flow scheduler, or its transformer learnt a variance.
        """
        SanaFamily.from_pipeline(pipeline)  # pyright: ignore[reportArgumentType]
        config = pipeline.transformer.config
        if config["out_channels"] != config["in_channels"]:
            raise ValueError("a SANA transformer that learnt a variance has no ControlNet here: give one without")
        scheduler: Any = pipeline.scheduler
        return SanaControlFamily(time_scale=float(scheduler.config["num_train_timesteps"]))

    def network(self, pipeline: SanaControlNetPipeline) -> ControlledSana:  # pyright: ignore
        return ControlledSana(pipeline.transformer, pipeline.controlnet)

    def parts(self, network: ControlledSana) -> dict[str, Any]:  # pyright: ignore
        """The transformer and its ControlNet."""
        return network.parts

    def velocity(self, network: ControlledSana, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:  # pyright: ignore
        """The transformer's output, with the residuals of the ControlNet behind its first blocks.

        Raises:
            ValueError: the condition has no token mask, or no control picture.
        """
        if condition.token_mask is None or condition.control is None:
            missing = "mask of its text tokens" if condition.token_mask is None else "control picture"
            raise ValueError(
                f"SANA with a ControlNet needs a {missing}, and the condition has none: encode with its family, then "
                "dataclasses.replace(condition, control=...) with latents of the pictures to follow"
            )
        dtype = network_dtype(network)
        time, mask = t.expand(x_t.shape[0]) * self.time_scale, condition.token_mask
        return network(x_t.to(dtype), time, condition.text.to(dtype), mask, condition.control.to(dtype))[0].to(x_t)

    def feature_modules(self, network: ControlledSana, blocks: Sequence[int] | None) -> list[nn.Module]:  # pyright: ignore
        """Blocks of the transformer, as in `SanaFamily`."""
        return super().feature_modules(network.transformer, blocks)

    def feature_channels(self, network: ControlledSana, blocks: Sequence[int] | None) -> list[int]:  # pyright: ignore
        config = network.transformer.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return [width] * len(self.feature_modules(network, blocks))

    def prompt_arguments(self, pipeline: Any, condition: Condition, null: Condition | None) -> dict[str, Any] | None:
        """None: the pipeline also needs its control picture."""
        return None

    def teacher_grid(  # pyright: ignore
        self, pipeline: SanaControlNetPipeline, steps: int, shape: tuple[int, ...] | None = None
    ) -> tuple[float, ...]:
        """The sigmas of the scheduler; of one with a single training step, the uniform times after its shift."""
        config: Any = pipeline.scheduler.config
        if config["num_train_timesteps"] == 1:
            return step_grid(steps, shift=config["shift"])
        return super().teacher_grid(pipeline, steps, shape)  # pyright: ignore[reportArgumentType]


def controlnet_of(transformer: SanaTransformer2DModel, *, layers: int) -> SanaControlNetModel:
    """A ControlNet that starts as a copy of the transformer's first blocks and as yet adds nothing (arXiv:2302.05543).

    The stock ControlNet has no norms of queries and keys, so those of the transformer are left out.

    Raises:
        ValueError: the transformer has not so many blocks before its last, behind which nothing can be added.
    """
    config = transformer.config
    if not 1 <= layers < config["num_layers"]:
        raise ValueError(f"layers is {layers}; choose 1 to {config['num_layers'] - 1} of {config['num_layers']} blocks")
    names = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_cross_attention_heads",
        "cross_attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
        "mlp_ratio",
        "attention_bias",
        "sample_size",
        "patch_size",
        "norm_elementwise_affine",
        "norm_eps",
        "interpolation_scale",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: Any = SanaControlNetModel.from_config({name: config[name] for name in names} | {"num_layers": layers})
    missing, _ = made.load_state_dict(transformer.state_dict(), strict=False)
    new = [name for name in missing if not name.startswith(("input_block.", "controlnet_blocks."))]
    assert not new, f"weights {new} have no counterpart"
    return made.to(next(transformer.parameters()).device).eval()


def with_controlnet(pipeline: SanaPipeline, *, layers: int) -> SanaControlNetPipeline:
    """The parts of a SANA pipeline with dense time, a fresh ControlNet, and a scheduler of that time.

    Raises:
        ValueError: the network is not called at t in [0, 1], or see `controlnet_of`.
    """
    family = SanaFamily.from_pipeline(pipeline)
    if family.time_scale != 1:
        raise ValueError(
            f"this network is called at {family.time_scale:g} t: give one with dense time (with_dense_time, fine-tuned)"
        )
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    controlled = SanaControlNetPipeline(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        transformer=pipeline.transformer,
        controlnet=controlnet_of(pipeline.transformer, layers=layers),
        scheduler=scheduler,
    )
    controlled.set_progress_bar_config(disable=True)
    return controlled
