"""The planned stock schedulers step on the student's grid and do the student's update."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import (
    LCM_TIMESTEP_SCALING,
    SchedulerPlan,
    nearest_exportable_times,
    plan_scheduler,
    table_indices,
)
from fewstep.core.families.sd3 import Sd3Family
from fewstep.core.grids import step_grid, three_step_parameters
from fewstep.core.paths import VariancePreserving

SHAPE = (2, 4, 8, 8)


def planned(pipeline, spec: SamplerSpec):
    """The plan for a pipeline whose call hands the number of steps on, as that of SD3 does."""
    return plan_scheduler(pipeline, Sd3Family(1000), spec)


def lcm_boundary_deviation(index: int, timestep_scaling: float = LCM_TIMESTEP_SCALING) -> tuple[float, float]:
    """(c_skip, 1 - c_out) of LCMScheduler at a table index: by how much its last step misses x0.

    LCM returns c_out x0 + c_skip x with c_skip = s^2 / ((index k)^2 + s^2), c_out = index k / sqrt((index k)^2 + s^2),
    s = 0.5 and k the `timestep_scaling` (arXiv:2310.04378, section 4.1).
    """
    scaled, data = index * timestep_scaling, 0.5
    c_skip = data**2 / (scaled**2 + data**2)
    return c_skip, -math.expm1(-0.5 * math.log1p((data / scaled) ** 2))


class GridPipeline(DiffusionPipeline):
    """A pipeline whose call takes any grid, as those of SD3 and SDXL do."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, num_inference_steps: int, timesteps=None, sigmas=None) -> None:
        raise AssertionError("planning a scheduler calls no network")


class PlainPipeline(DiffusionPipeline):
    """A pipeline whose call takes the number of steps alone, as Wan's does."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, num_inference_steps: int) -> None:
        raise AssertionError("planning a scheduler calls no network")


class GeneratorPipeline(GridPipeline):
    """A pipeline that hands its generator to the scheduler where Stable Diffusion does it."""

    def prepare_extra_step_kwargs(self) -> None:
        raise AssertionError("planning a scheduler calls no network")


def flow_pipeline() -> GridPipeline:
    return GridPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0))


def table_scheduler(prediction_type: Literal["epsilon", "v_prediction"] = "epsilon") -> PNDMScheduler:
    """The noise table of Stable Diffusion in the scheduler that SD1.5 ships."""
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def table_path() -> VariancePreserving:
    return VariancePreserving(table_scheduler().alphas_cumprod)


def times_of(indices: Sequence[int]) -> tuple[float, ...]:
    return tuple(table_path().to_flow_time(torch.tensor(indices, dtype=torch.float64)).tolist())


def set_timesteps(plan: SchedulerPlan) -> Any:
    """The scheduler as the pipelines prepare it: a custom grid replaces the number of steps."""
    extra = plan.extra_arguments()
    if extra:
        plan.scheduler.set_timesteps(**extra)
    else:
        plan.scheduler.set_timesteps(plan.num_inference_steps)
    return plan.scheduler


def network(x: Tensor, time: float) -> Tensor:
    """A smooth function in the place of a network; it depends on state and time."""
    return 0.8 * x + torch.tanh(x.flip(-1) + time)


def run_scheduler(
    plan: SchedulerPlan, noise: Tensor, *, predict: Callable[[Tensor, float], Tensor], seed: int
) -> Tensor:
    scheduler = set_timesteps(plan)
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    torch.manual_seed(seed)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, float(timestep)), timestep, x, return_dict=False)[0]
    return x


def draw_noise(seed: int, count: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(SHAPE) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 8), shift=st.floats(0.2, 20.0), sampler=st.sampled_from(["sde", "ode"]))
def test_flow_scheduler_steps_on_any_shifted_grid(steps, shift, sampler):
    times = step_grid(steps, shift=shift)
    plan = planned(flow_pipeline(), SamplerSpec(times, sampler))
    assert plan.extra_arguments() == {}
    scheduler = set_timesteps(plan)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*times, 0.0]), rtol=0, atol=2e-6)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(plan.network_timesteps), rtol=0, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_flow_scheduler_does_the_update_of_the_student(steps, shift, sampler):
    times = step_grid(steps, shift=shift)
    plan = planned(flow_pipeline(), SamplerSpec(times, sampler))
    noise = torch.randn(SHAPE)
    # the scheduler draws after the last step too, and multiplies that by zero
    draws = draw_noise(7, steps)
    x = noise
    for i, t in enumerate(times):
        following = times[i + 1] if i + 1 < steps else 0.0
        velocity = network(x, 1000 * t)
        x0 = x - t * velocity
        x = (1 - following) * x0 + following * draws[i] if sampler == "sde" else x + (following - t) * velocity
    actual = run_scheduler(plan, noise, predict=network, seed=7)
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-5 * x.abs().max().item())


def test_two_flow_steps_reach_any_second_time():
    plan = planned(PlainPipeline(FlowMatchEulerDiscreteScheduler()), SamplerSpec((1.0, 0.123), "sde"))
    assert set_timesteps(plan).sigmas.tolist() == pytest.approx([1.0, 0.123, 0.0], abs=2e-6)


def test_flow_grid_without_a_shift_goes_into_the_call():
    times = (1.0, 0.7, 0.5, 0.2)
    plan = planned(flow_pipeline(), SamplerSpec(times, "sde"))
    assert plan.extra_arguments() == {"sigmas": [1.0, 0.7, 0.5, 0.2]}
    assert set_timesteps(plan).sigmas.tolist() == pytest.approx([1.0, 0.7, 0.5, 0.2, 0.0], abs=1e-7)
    with pytest.raises(ValueError, match=r"\(1\.0, 0\.7, 0\.5, 0\.2\).*PlainPipeline takes no `sigmas`.*step_grid"):
        planned(PlainPipeline(FlowMatchEulerDiscreteScheduler()), SamplerSpec(times, "sde"))


@settings(max_examples=80, deadline=None)
@given(middle=st.floats(0.2, 0.98), share=st.floats(0.2, 0.98))
@example(middle=0.757, share=0.522 / 0.757)
def test_three_steps_from_one_on_need_no_argument(middle: float, share: float):
    """Any grid (1, a, b) that the scheduler can reach, FastWan's 1000, 757, 522 among them; others go into the call."""
    times = (1.0, middle, middle * share)
    plan = planned(flow_pipeline(), SamplerSpec(times, "sde"))
    reached = plan.extra_arguments() == {}
    assert reached <= (three_step_parameters(times) is not None)
    assert set_timesteps(plan).sigmas.tolist() == pytest.approx([*times, 0.0], abs=2e-6)
    if (middle, share) == (0.757, 0.522 / 0.757):
        assert reached
        planned(PlainPipeline(FlowMatchEulerDiscreteScheduler()), SamplerSpec(times, "sde"))


def test_flow_grid_that_starts_late_goes_into_the_call():
    plan = planned(flow_pipeline(), SamplerSpec((0.9,), "sde"))
    assert set_timesteps(plan).sigmas.tolist() == pytest.approx([0.9, 0.0], abs=1e-7)


def test_planning_leaves_the_pipeline_alone():
    pipeline = flow_pipeline()
    plan = planned(pipeline, SamplerSpec(step_grid(4), "sde"))
    assert pipeline.scheduler.config.shift == 3.0
    assert plan.scheduler.config.stochastic_sampling is True
    assert len(plan.scheduler.timesteps) == 1000


@settings(max_examples=60, deadline=None)
@given(original=st.integers(1, 1000), fraction=st.floats(0.0, 1.0))
def test_every_grid_of_lcm_is_found_without_arguments(original, fraction):
    steps = 1 + int(fraction * (min(original, 8) - 1))
    scheduler: Any = LCMScheduler(original_inference_steps=original)
    scheduler.set_timesteps(steps)
    indices = scheduler.timesteps.tolist()
    plan = planned(GeneratorPipeline(table_scheduler()), SamplerSpec(times_of(indices), "sde"))
    assert plan.extra_arguments() == {}
    assert set_timesteps(plan).timesteps.tolist() == indices


@pytest.mark.parametrize(
    ("indices", "original"),
    [((999,), 1), ((999, 499), 2), ((999, 749, 499, 249), 4), ((999, 666, 333), 1000), ((399,), None)],
)
def test_lcm_grids_of_known_models(indices, original):
    plan = planned(GeneratorPipeline(table_scheduler()), SamplerSpec(times_of(indices), "sde"))
    assert isinstance(plan.scheduler, LCMScheduler)
    assert plan.network_timesteps == indices
    assert plan.timesteps == (None if original else indices)
    if original:
        assert plan.scheduler.config["original_inference_steps"] == original
    assert set_timesteps(plan).timesteps.tolist() == list(indices)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("indices", [(999,), (999, 499), (999, 749, 499, 249), (999, 600, 100, 3)])
def test_table_scheduler_does_the_update_of_the_student(indices, sampler, prediction_type):
    plan = planned(GeneratorPipeline(table_scheduler(prediction_type)), SamplerSpec(times_of(indices), sampler))
    table = table_scheduler().alphas_cumprod.double()
    alphas, sigmas = [*table[list(indices)].sqrt().tolist(), 1.0], [*(1 - table[list(indices)]).sqrt().tolist(), 0.0]
    noise, draws = torch.randn(SHAPE), draw_noise(7, len(indices) - 1)
    x = noise.double()
    for i, index in enumerate(indices):
        output = network(x, index)
        if prediction_type == "epsilon":
            x0, eps = (x - sigmas[i] * output) / alphas[i], output
        else:
            x0, eps = alphas[i] * x - sigmas[i] * output, sigmas[i] * x + alphas[i] * output
        last = i + 1 == len(indices)
        fresh = draws[i].double() if sampler == "sde" and not last else eps
        x = alphas[i + 1] * x0 + sigmas[i + 1] * fresh
    actual = run_scheduler(plan, noise, predict=network, seed=7).double()
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-5 * x.abs().max().item())


def test_ode_on_a_table_uses_ddim_where_its_grid_fits():
    pipeline = GeneratorPipeline(table_scheduler())
    uniform = planned(pipeline, SamplerSpec(times_of((999, 749, 499, 249)), "ode"))
    assert isinstance(uniform.scheduler, DDIMScheduler)
    assert uniform.extra_arguments() == {}
    other = planned(pipeline, SamplerSpec(times_of((999, 666, 333)), "ode"))
    assert isinstance(other.scheduler, EulerDiscreteScheduler)
    assert other.extra_arguments() == {"timesteps": [999, 666, 333]}
    with pytest.raises(ValueError, match=r"PlainPipeline takes no `timesteps`.*\(998, 665, 332\)"):
        planned(PlainPipeline(table_scheduler()), SamplerSpec(times_of((999, 666, 333)), "ode"))


@pytest.mark.parametrize(("index", "default_skip"), [(249, 5e-8), (9, 4e-5)])
def test_lcm_boundary_scaling_is_below_fp32(index, default_skip):
    scheduler: Any = LCMScheduler(timestep_scaling=LCM_TIMESTEP_SCALING)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(index))
    expected_skip, expected_missing = lcm_boundary_deviation(index)
    assert c_skip.item() == pytest.approx(expected_skip, rel=1e-5)
    assert expected_skip < 1e-10
    assert expected_missing < 1e-10
    assert c_out.item() == 1.0
    default: Any = LCMScheduler()
    c_skip, _ = default.get_scalings_for_boundary_condition_discrete(torch.tensor(index))
    assert default_skip / 2 < c_skip.item() < default_skip
    assert lcm_boundary_deviation(index, 10.0)[0] == pytest.approx(c_skip.item(), rel=1e-5)


def test_ode_on_a_table_starts_at_its_last_entry():
    times = (1.0, *times_of((499,)))
    assert planned(GeneratorPipeline(table_scheduler()), SamplerSpec(times, "sde")).network_timesteps == (
        999,
        499,
    )
    with pytest.raises(ValueError, match=r"start on the noise table, at 0\.9359\d* instead of 1\.0"):
        planned(GeneratorPipeline(table_scheduler()), SamplerSpec(times, "ode"))


def test_lcm_at_index_zero_is_refused():
    with pytest.raises(ValueError, match="ends at table index 0"):
        planned(GeneratorPipeline(table_scheduler()), SamplerSpec(times_of((999, 0)), "sde"))


def test_time_one_means_the_last_table_entry():
    assert table_indices(table_path(), (1.0, times_of((499,))[0])) == (999, 499)


def test_times_between_table_entries_are_refused_with_the_nearest_grid():
    pipeline = GeneratorPipeline(table_scheduler())
    with pytest.raises(ValueError, match=r"999\.0, 673\.155, 353\.89, 95\.314.*nearest grid.*0\.7498"):
        planned(pipeline, SamplerSpec(step_grid(4), "sde"))
    times = nearest_exportable_times(pipeline, step_grid(4))
    plan = planned(pipeline, SamplerSpec(times, "sde"))
    assert plan.network_timesteps == (999, 673, 354, 95)
    assert times[0] == pytest.approx(table_path().flow_time_range[1], abs=1e-12)
    assert max(abs(a - b) for a, b in zip(times[1:], step_grid(4)[1:], strict=True)) < 1e-3
    with pytest.raises(ValueError, match="strictly"):
        nearest_exportable_times(pipeline, (0.5, 0.49999))
    assert nearest_exportable_times(flow_pipeline(), (1.0, 0.7, 0.2)) == (1.0, 0.7, 0.2)


@pytest.mark.parametrize(
    ("pipeline", "steps", "sampler", "expected"),
    [
        (flow_pipeline(), 2, "sde", "global"),
        (flow_pipeline(), 1, "sde", "none"),
        (flow_pipeline(), 2, "ode", "none"),
        (GeneratorPipeline(table_scheduler()), 2, "sde", "generator"),
        (GeneratorPipeline(table_scheduler()), 2, "ode", "none"),
    ],
)
def test_source_of_the_noise_between_steps(pipeline, steps, sampler, expected):
    times = step_grid(steps) if sampler == "sde" and expected == "global" else times_of((999, 499)[:steps])
    assert planned(pipeline, SamplerSpec(times, sampler)).step_noise == expected


def test_other_schedulers_and_samplers_are_refused():
    with pytest.raises(ValueError, match="sampler is 'euler', allowed are sde, ode, flow_map"):
        SamplerSpec((1.0,), "euler")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="strictly"):
        SamplerSpec((0.5, 1.0), "sde")

    class NoTable(DiffusionPipeline):
        def __init__(self) -> None:
            super().__init__()
            self.register_modules(scheduler=HeunDiscreteScheduler())

    pipeline = NoTable()
    del pipeline.scheduler.alphas_cumprod
    with pytest.raises(ValueError, match="HeunDiscreteScheduler; exports exist for"):
        planned(pipeline, SamplerSpec((1.0,), "sde"))
