"""What rectified-flow families ask of schedulers and networks, from the JSON files, and how their grids are shifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def require_fixed_grid(scheduler: Mapping[str, Any], *, by_size: bool = False) -> None:
    """Raises ValueError for a flow scheduler that draws noise, turns the times round, or whose times do not follow from
    the number of steps alone; `by_size` where the family knows how a stock call shifts them by the size."""
    names = ("stochastic_sampling", "invert_sigmas", *(() if by_size else ("use_dynamic_shifting",)))
    if any(scheduler.get(name) for name in names):
        fixed = "" if by_size else ", so that its grid follows from the steps alone: set a fixed shift"
        raise ValueError(
            f"the teacher's scheduler must have {' and '.join(sorted(names))} off{fixed} in "
            "scheduler/scheduler_config.json"
        )
    shift = scheduler.get("shift", 1.0)
    if shift is None or not shift > 0:
        raise ValueError(f"the teacher's scheduler has the shift {shift}, and it must be positive")


def require_flow_scheduler(scheduler: Mapping[str, Any], model: str, *, by_size: bool = False) -> None:
    """Raises ValueError for another scheduler than Euler on rectified flow, or a solver of higher order on its sigmas;
    see `require_fixed_grid`."""
    name = str(scheduler.get("_class_name"))
    if name != "FlowMatchEulerDiscreteScheduler" and not scheduler.get("use_flow_sigmas"):
        raise ValueError(
            f"{model} needs a FlowMatchEulerDiscreteScheduler, or a solver with use_flow_sigmas; this pipeline has "
            f"{name}: replace scheduler/scheduler_config.json by the original model's"
        )
    require_fixed_grid(scheduler, by_size=by_size)


def require_same_channels(network: Mapping[str, Any], *, default: int) -> None:
    """Raises ValueError for the config of a network that takes other channels than it gives."""
    takes, gives = (
        network.get("in_channels", default),
        network.get("out_channels") or network.get("in_channels", default),
    )
    if takes != gives:
        raise ValueError(
            f"the transformer takes {takes} channels and gives {gives}: it is told a picture beside the text; use a "
            "model that is told text alone"
        )


def shift_of_tokens(scheduler: Any, tokens: int) -> float:
    """The `mu` that stock calls hand to a scheduler that shifts by the size: linear in the number of tokens."""
    config = scheduler.config
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
