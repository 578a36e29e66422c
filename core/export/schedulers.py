"""Stock diffusers schedulers that step exactly where a student was trained to step.

K steps, T entries of the teacher's noise table. Canonical times `t` are those of rectified flow (1 is noise).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
)

from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.sana import sprint_angles
from fewstep.core.families.family import Family
from fewstep.core.families.parts.noise_table import ddim_of, noise_table
from fewstep.core.grids import (
    euler_scheduler_parameters,
    shift_of_grid,
    step_grid,
    three_step_parameters,
    validate_grid,
)
from fewstep.core.paths import VariancePreserving
from fewstep.core.run_settings import Sampler

# The scheduler computes in fp32; one ulp of a time near 1 is 6e-8 and a handful of operations follow.
GRID_TOLERANCE = 2e-6


# A scheduler with this shifts its noise table by a scale of its own (CogVideoX).
SHIFTED_TABLE = "snr_shift_scale"


# A canonical time in fp32 reproduces its table index to about 1e-3 where the table is flattest in t.
INDEX_TOLERANCE = 1e-2


# The boundary scalings of LCM then miss 0 and 1 by less than 3e-9, which fp32 does not see;
# with the diffusers default of 10 they miss them by 4e-8 at index 249 and by 3e-5 at index 9.
LCM_TIMESTEP_SCALING = 1e4


@dataclass(frozen=True)
class SchedulerPlan:
    """A scheduler and what the pipeline has to be called with for it to step on the student's grid.

    scheduler: a FlowMatchEulerDiscreteScheduler, FlowMapEulerDiscreteScheduler, LCMScheduler, DDIMScheduler,
        CogVideoXDDIMScheduler, EulerDiscreteScheduler or SCMScheduler.
    network_timesteps: what the network is called with, in the units of the pipeline (fp32 values or table indices).
    step_noise: where the noise between steps comes from, "none" if there is none: the "generator" of the call, or
        torch's "global" one, because the pipeline does not hand its generator to the scheduler.
    sigmas, timesteps: extra arguments of the pipeline's __call__, None where the scheduler needs none.
    max_timesteps, intermediate_timesteps: angles, extra arguments of SanaSprintPipeline's __call__; the first is None
        for other pipelines, the second for other than two steps.
    step_times: canonical times of a rectified flow in the scheduler's own rounding, None for other schedulers.
    """

    scheduler: Any
    num_inference_steps: int
    network_timesteps: tuple[float, ...]
    step_noise: Literal["none", "generator", "global"]
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | None = None
    step_times: tuple[float, ...] | None = None

    def extra_arguments(self) -> dict[str, Any]:
        """Keyword arguments for the pipeline's __call__ beside `num_inference_steps` and `guidance_scale`."""
        if self.max_timesteps is not None:
            return {"max_timesteps": self.max_timesteps, "intermediate_timesteps": self.intermediate_timesteps}
        if self.sigmas is not None:
            return {"sigmas": list(self.sigmas)}
        if self.timesteps is not None:
            return {"timesteps": list(self.timesteps)}
        return {}


def plan_scheduler(pipeline: DiffusionPipeline, family: Family, spec: SamplerSpec) -> SchedulerPlan:
    """The stock scheduler for `spec` in the teacher's `pipeline`, which is not changed, and its family.

    Raises ValueError if no stock scheduler can express the grid or the sampler with this pipeline.
    """
    scheduler = pipeline.scheduler
    if isinstance(scheduler, SCMScheduler):
        first, middle = sprint_angles(spec)
        step_noise, fresh = _step_noise(pipeline, spec), SCMScheduler(sigma_data=scheduler.config["sigma_data"])
        return SchedulerPlan(
            fresh, spec.steps, spec.times, step_noise, max_timesteps=first, intermediate_timesteps=middle
        )
    if _is_flow(scheduler):
        return _plan_flow(pipeline, family, spec, num_train_timesteps=scheduler.config["num_train_timesteps"])
    if spec.sampler == "flow_map":
        raise ValueError(
            f"the teacher's scheduler is {type(scheduler).__name__}; flow maps of two times are exported with "
            "FlowMatchEulerDiscreteScheduler. Give a teacher of rectified flow."
        )
    if isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor):
        return _plan_variance_preserving(pipeline, spec)
    raise ValueError(
        f"the teacher's scheduler is {type(scheduler).__name__}; exports exist for FlowMatchEulerDiscreteScheduler and "
        "for schedulers with a DDPM table (alphas_cumprod). Give the teacher one of these."
    )


def _is_flow(scheduler: Any) -> bool:
    """Whether a scheduler walks rectified flow: a DPM-Solver with flow sigmas has a DDPM table too, unused."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def _step_noise(pipeline: DiffusionPipeline, spec: SamplerSpec) -> Literal["none", "generator", "global"]:
    if spec.sampler != "sde" or spec.steps == 1:
        return "none"
    # The pipelines that hand their generator on do it in this method; the flow pipelines have none.
    return "generator" if hasattr(pipeline, "prepare_extra_step_kwargs") else "global"


def _plan_flow(
    pipeline: DiffusionPipeline, family: Family, spec: SamplerSpec, *, num_train_timesteps: int
) -> SchedulerPlan:
    network_timesteps = tuple(family.network_time(time) for time in spec.times)
    found = _flow_scheduler(pipeline, family, spec, num_train_timesteps)
    if found is None:
        raise ValueError(
            f"the grid {spec.times} is not a uniform grid with a time shift, and {type(pipeline).__name__} takes no "
            "`sigmas`. Train on step_grid(steps, shift=...), or on any grid (1, t) for two steps."
        )
    scheduler, sigmas, step_times = found
    return SchedulerPlan(
        scheduler, spec.steps, network_timesteps, _step_noise(pipeline, spec), sigmas=sigmas, step_times=step_times
    )


def _flow_scheduler(
    pipeline: DiffusionPipeline, family: Family, spec: SamplerSpec, num_train_timesteps: int
) -> tuple[FlowMatchEulerDiscreteScheduler, tuple[float, ...] | None, tuple[float, ...]] | None:
    """The scheduler that steps on the grid when a stock call sets it, the `sigmas` that the call then needs, and the
    times that are reached; None where there is none. Each is tried by doing to it what the call does.

    Nothing is taken from the teacher's scheduler but the number of its timesteps: a shift or a last sigma that was left
    in would bend the student's grid.
    """
    if family.call_sigmas(spec.steps) is not None:
        # The call's own sigmas fall evenly to 1 / K, and the shift is all that happens to them.
        parameters = (shift_of_grid(spec.times) or 1.0, None)
    else:
        parameters = _flow_parameters(spec.times, num_train_timesteps)
    takes_sigmas = "sigmas" in inspect.signature(pipeline.__call__).parameters
    for (shift, terminal), sigmas in ((parameters, None), ((1.0, None), spec.times)):
        scheduler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            shift_terminal=terminal,  # pyright: ignore[reportArgumentType]
            stochastic_sampling=spec.sampler == "sde",
        )
        family.set_timesteps(scheduler, spec.steps, sigmas=sigmas)
        reached = cast(torch.Tensor, scheduler.sigmas)[:-1].tolist()
        fits = len(reached) == spec.steps and _largest_difference(reached, spec.times) <= GRID_TOLERANCE
        if fits and (sigmas is None or takes_sigmas):
            return _fresh(scheduler), sigmas, tuple(reached)
    return None


def _flow_parameters(times: tuple[float, ...], num_train_timesteps: int) -> tuple[float, float | None]:
    """(shift, shift_terminal) of the scheduler; (1, None) where none reaches the grid."""
    shift = shift_of_grid(times)
    if shift is None and len(times) == 3 and times[0] == 1:
        return three_step_parameters(times, num_train_timesteps=num_train_timesteps) or (1.0, None)
    if shift is None:
        return 1.0, None
    try:
        return euler_scheduler_parameters(len(times), shift, num_train_timesteps=num_train_timesteps)
    except ValueError:
        # Sixteen steps or more with a very large shift: the times then go into the call, which is as exact.
        return 1.0, None


def table_indices(path: VariancePreserving, times: Sequence[float]) -> tuple[int, ...]:
    """Indices into the DDPM table of canonical `times`; times at or above the last entry mean T - 1.

    Raises ValueError if a time lies between two entries: LCM and DDIM know whole indices only.
    """
    last = path.alphas_cumprod.shape[0] - 1
    exact = path.from_flow_time(torch.tensor(list(times), dtype=torch.float64)).clamp(max=last)
    indices = exact.round()
    if (exact - indices).abs().max().item() > INDEX_TOLERANCE:
        raise ValueError(
            f"the times {tuple(times)} fall between entries of the teacher's noise table (indices "
            f"{[round(index, 3) for index in exact.tolist()]}), which no stock scheduler steps on. Train on "
            "whole indices: the nearest grid, which nearest_exportable_times gives, is "
            f"{path.to_flow_time(indices).tolist()}."
        )
    return tuple(int(index) for index in indices.tolist())


def nearest_exportable_times(pipeline: DiffusionPipeline, times: Sequence[float]) -> tuple[float, ...]:
    """The grid next to `times` that a stock scheduler can step on: `times` itself for flow pipelines, whole entries of
    the noise table for the others, where 1 becomes the time of the last entry. Train on these.

    Raises ValueError if two times fall on one entry.
    """
    if _is_flow(pipeline.scheduler):
        return tuple(times)
    path = noise_table(pipeline.scheduler)
    last = path.alphas_cumprod.shape[0] - 1
    indices = path.from_flow_time(torch.tensor(list(times), dtype=torch.float64)).clamp(max=last).round()
    snapped = tuple(path.to_flow_time(indices).tolist())
    validate_grid(snapped)
    return snapped


class Grid(Protocol):
    """Which times a student is called at: `times`, or `timesteps` in the network's units, or an even shifted grid."""

    @property
    def steps(self) -> int: ...
    @property
    def shift(self) -> float: ...
    @property
    def times(self) -> tuple[float, ...] | None: ...
    @property
    def timesteps(self) -> tuple[float, ...] | None: ...


def exportable_times(pipeline: DiffusionPipeline, family: Family, grid: Grid, sampler: Sampler) -> tuple[float, ...]:
    """`student_times` of a student of one grid, which is trained for nothing if no stock scheduler steps on it.

    Raises ValueError as `student_times` and `plan_scheduler`.
    """
    times = student_times(pipeline, grid)
    spec = SamplerSpec(times, sampler)
    family.require_exportable(spec.sampler, spec.times)
    plan_scheduler(pipeline, family, spec)
    return times


def student_times(pipeline: DiffusionPipeline, grid: Grid) -> tuple[float, ...]:
    """The canonical times of a student of this teacher, such as a stock scheduler can step on.

    Raises ValueError for times that are no grid, or lie outside of what the network knows.
    """
    if grid.timesteps is None:
        return nearest_exportable_times(pipeline, grid.times or step_grid(grid.steps, shift=grid.shift))
    length = pipeline.scheduler.config["num_train_timesteps"]
    highest = length if _is_flow(pipeline.scheduler) else length - 1
    if not 0 < grid.timesteps[-1] <= grid.timesteps[0] <= highest:
        raise ValueError(
            f"student.timesteps is {list(grid.timesteps)}; the teacher's network knows those above 0 up to {highest}"
        )
    if _is_flow(pipeline.scheduler):
        return tuple(step / length for step in grid.timesteps)
    indices = torch.tensor(grid.timesteps, dtype=torch.float64)
    if not torch.equal(indices, indices.round()):
        raise ValueError(f"student.timesteps is {list(grid.timesteps)}; the teacher's noise table has whole numbers")
    return tuple(noise_table(pipeline.scheduler).to_flow_time(indices).tolist())


def _plan_variance_preserving(pipeline: DiffusionPipeline, spec: SamplerSpec) -> SchedulerPlan:
    path = noise_table(pipeline.scheduler)
    indices = table_indices(path, spec.times)
    if indices[-1] == 0:
        raise ValueError(f"the grid {spec.times} ends at table index 0, where LCM returns its input. Use index >= 1.")
    step_noise = _step_noise(pipeline, spec)
    if spec.sampler == "sde" or spec.steps == 1:
        scheduler, native = _lcm_scheduler(pipeline.scheduler, indices)
    else:
        _, last_time = path.flow_time_range
        if spec.times[0] > last_time + GRID_TOLERANCE:
            raise ValueError(
                f"an ode grid must start on the noise table, at {last_time} instead of {spec.times[0]}: from there on "
                "stock schedulers step along the predicted noise. nearest_exportable_times gives such a grid."
            )
        scheduler, native = _ode_scheduler(pipeline.scheduler, indices)
    if native:
        return SchedulerPlan(scheduler, spec.steps, indices, step_noise)
    if "timesteps" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(
            f"{type(scheduler).__name__} does not place its own steps at the table indices {indices}, and "
            f"{type(pipeline).__name__} takes no `timesteps`. Train on the uniform grid of indices "
            f"{_uniform_indices(len(pipeline.scheduler.alphas_cumprod), spec.steps)}."
        )
    return SchedulerPlan(scheduler, spec.steps, indices, step_noise, timesteps=indices)


def _uniform_indices(table_length: int, steps: int) -> tuple[int, ...]:
    return tuple(i * (table_length // steps) - 1 for i in range(steps, 0, -1))


def _lcm_scheduler(teacher: Any, indices: tuple[int, ...]) -> tuple[LCMScheduler, bool]:
    """LCMScheduler on the teacher's table, and whether it reaches `indices` from `num_inference_steps` alone."""
    length, steps = teacher.config["num_train_timesteps"], len(indices)
    settings: dict[str, Any] = _table_settings(teacher) | {"timestep_scaling": LCM_TIMESTEP_SCALING}
    # steps first: it is the readable one, and the grid of DMD2 (999, 749, 499, 249) has it
    for original_steps in range(steps, length + 1):
        if _lcm_indices(length, original_steps, steps) == indices:
            return LCMScheduler(original_inference_steps=original_steps, **settings), True
    # every index is "original" then, so that the scheduler does not warn about indices it was not made for
    return LCMScheduler(original_inference_steps=length, **settings), False


def _lcm_indices(length: int, original_steps: int, steps: int) -> tuple[int, ...]:
    """What LCMScheduler.set_timesteps(steps) gives; a test holds it against the scheduler itself."""
    stride = length // original_steps
    chosen = np.floor(np.linspace(0, original_steps, num=steps, endpoint=False)).astype(int)
    return tuple(int((original_steps - i) * stride - 1) for i in chosen)


def _ode_scheduler(teacher: Any, indices: tuple[int, ...]) -> tuple[Any, bool]:
    """DDIM where its own grid is `indices`, else Euler, which takes any indices as an argument of the call."""
    settings, config = _table_settings(teacher), teacher.config
    length, steps = config["num_train_timesteps"], len(indices)
    uniform = length % steps == 0 and indices == _uniform_indices(length, steps)
    if uniform and SHIFTED_TABLE in config:
        own: Any = CogVideoXDDIMScheduler
        ends = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
        return own.from_config({**config, **ends}), True
    if uniform:
        ddim = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, **settings)
        return ddim, True
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"the teacher's table has zero terminal SNR, on which Euler steps of stock schedulers start from another "
            f"alpha; DDIM steps at the indices {_uniform_indices(length, steps)} of {steps} even steps alone. Train on "
            "these (student.timesteps), or with the sampler sde"
        )
    # "leading" only sets the scale of the first noise here, sqrt(sigma^2 + 1), so that the network sees it unscaled
    return EulerDiscreteScheduler(timestep_spacing="leading", final_sigmas_type="zero", **settings), False


def _table_settings(teacher: Any) -> dict[str, Any]:
    """The teacher's noise table and prediction type, as arguments of a scheduler."""
    config = teacher.config
    if SHIFTED_TABLE in config:
        # Other schedulers know no such shift, and any table by its betas.
        table = ddim_of(teacher).alphas_cumprod.double()
        betas = (1 - table / torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])).tolist()
        kept = {name: config[name] for name in ("num_train_timesteps", "prediction_type")}
        return {**kept, "trained_betas": betas, "steps_offset": 1}
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    settings: dict[str, Any] = {name: config[name] for name in names}
    settings["rescale_betas_zero_snr"] = config.get("rescale_betas_zero_snr", False)
    # StableDiffusionPipeline rewrites a configuration whose offset is not 1; no scheduler above uses the offset
    settings["steps_offset"] = 1
    return settings


def _largest_difference(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def _fresh(scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
    return cast(FlowMatchEulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler.from_config(scheduler.config))
