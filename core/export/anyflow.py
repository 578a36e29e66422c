"""Wan students of two times as a stock AnyFlowPipeline, whose scheduler takes any number of steps (arXiv:2605.13724).

AnyFlowTransformer3DModel is Wan's transformer with the time embedding

    (1 - g) E(t) + g E_r(d),   d = r or t - r,   g a number of its config

and it is called with both times at every step, so that one export serves all numbers of steps. `TwoTimeLayers` are the
same function: "gate" has d = r and g = 1/4; "sum", E(t) + E_d(t - r), is g = 1/2 with the last layers of both
embeddings doubled, which loses no bit.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import GRID_TOLERANCE, SchedulerPlan
from fewstep.core.grids import shift_of_grid, step_grid
from fewstep.core.two_time import GATE, SITES, SUM_GATE, SUM_SCALE, second_time_of

NETWORK = "WanTransformer3DModel"
# What Wan's config may say beside sizes for the AnyFlow class, which has no such settings, to be the same network.
FIXED = {"qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None, "image_dim": None, "pos_embed_seq_len": None}
SIZES = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "eps",
    "rope_max_seq_len",
)


def is_anyflow_student(network: nn.Module) -> bool:
    """Whether this is a Wan transformer of two times, which AnyFlowTransformer3DModel can hold."""
    return type(network).__name__ == NETWORK and second_time_of(network) is not None


def anyflow_network(network: nn.Module) -> AnyFlowTransformer3DModel:
    """The same function as a stock AnyFlowTransformer3DModel, with copies of the weights in their dtype.

    Args:
        network: a Wan transformer with a second time of kind "gate" or "sum", adapters merged.

    Raises:
        ValueError: it has one time, or a part that the AnyFlow class has not.
    """
    layers = second_time_of(network)
    if type(network).__name__ != NETWORK or layers is None:
        raise ValueError(
            f"AnyFlowTransformer3DModel holds Wan transformers of two times, this is a {type(network).__name__} of one "
            "or another kind: train with second_time 'gate' or 'sum' on a Wan teacher"
        )
    check_anyflow_parts(network)
    found: Any = network.config
    is_sum = layers.kind == "sum"
    # Its random weights are thrown away: the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        stock = AnyFlowTransformer3DModel(
            **{name: found[name] for name in SIZES},
            gate_value=SUM_GATE if is_sum else GATE,
            deltatime_type="t-r" if is_sum else "r",
        )
    weight = next(network.parameters())
    nn.Module.to(stock, device=weight.device, dtype=weight.dtype)
    stock.load_state_dict({_stock_name(name): tensor for name, tensor in network.state_dict().items()})
    if is_sum:
        for embedder in (stock.condition_embedder.time_embedder, stock.condition_embedder.delta_embedder):
            _double(embedder.linear_2)
    return stock.eval()


def check_anyflow_parts(network: nn.Module) -> None:
    """Raise ValueError for a Wan transformer that the AnyFlow classes have no counterpart of."""
    found: Any = network.config
    other = {name: found[name] for name, value in FIXED.items() if found[name] != value}
    depth, height, width = found["patch_size"]
    if other or depth != 1 or height != width:
        raise ValueError(
            f"AnyFlowTransformer3DModel has {FIXED} and square patches one frame deep, this network has "
            f"{other or found['patch_size']}: it has no export as AnyFlowPipeline"
        )


def _stock_name(name: str) -> str:
    """The name of a two-time Wan's weight in the AnyFlow class."""
    layers = SITES[NETWORK].layers
    parent = layers.rpartition(".")[0]
    return name.replace(f"{layers}.first.", f"{layers}.").replace(f"{layers}.second.", f"{parent}.delta_embedder.")


@torch.no_grad()
def _double(layer: nn.Linear) -> None:
    for parameter in layer.parameters():
        parameter.mul_(SUM_SCALE)


def anyflow_pipeline(pipeline: WanPipeline, network: nn.Module, scheduler: Any) -> AnyFlowPipeline:
    """The parts of a Wan pipeline around the network as AnyFlow's, with the scheduler of a plan; both share the parts.

    Raises:
        ValueError: as `anyflow_network`.
    """
    made = AnyFlowPipeline(
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        transformer=anyflow_network(network),
        vae=pipeline.vae,
        scheduler=scheduler,
    )
    made.set_progress_bar_config(disable=True)
    return made


def plan_anyflow(pipeline: WanPipeline, spec: SamplerSpec) -> SchedulerPlan:
    """FlowMapEulerDiscreteScheduler on the student's grid; with a shift it makes the grids of all other step counts.

    Raises:
        ValueError: the sampler is no flow map, or the spec's shift does not give its times.
    """
    if spec.sampler != "flow_map":
        raise ValueError(f"AnyFlowPipeline jumps along a flow map, the sampler is {spec.sampler!r}: use 'flow_map'")
    scale: int = pipeline.scheduler.config["num_train_timesteps"]
    timesteps = tuple(scale * time for time in spec.times)
    shift = shift_of_grid(spec.times) if spec.shift is None else spec.shift
    if shift is None:
        plain = FlowMapEulerDiscreteScheduler(num_train_timesteps=scale)
        return SchedulerPlan(plain, spec.steps, timesteps, "none", sigmas=spec.times)
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=scale, shift=shift)
    scheduler.set_timesteps(spec.steps)
    sigmas: Tensor = scheduler.sigmas
    if max(abs(a - b) for a, b in zip(sigmas[:-1].tolist(), spec.times, strict=True)) > GRID_TOLERANCE:
        raise ValueError(
            f"the shift {spec.shift} makes the grid {step_grid(spec.steps, shift=shift)}, the times are {spec.times}: "
            "leave the shift out"
        )
    return SchedulerPlan(
        FlowMapEulerDiscreteScheduler(num_train_timesteps=scale, shift=shift), spec.steps, timesteps, "none"
    )
