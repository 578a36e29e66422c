"""Schedulers are planned by what a stock call does to them, and not by what its scheduler does alone."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import exportable_times, plan_scheduler
from fewstep.core.families.cosmos import CosmosFamily
from fewstep.core.families.family import Family
from fewstep.core.families.flux import FluxFamily
from fewstep.core.families.ltx import LtxFamily
from fewstep.core.families.qwen_image import QwenImageFamily
from fewstep.core.families.sd3 import Sd3Family
from fewstep.core.families.z_image import ZImageFamily
from fewstep.core.grids import euler_scheduler_parameters, step_grid
from tests.core.export.test_export_schedulers import GridPipeline, PlainPipeline

LINSPACE: tuple[Family, ...] = (
    FluxFamily(1000, 512, 3.5),
    QwenImageFamily(1000),
    ZImageFamily(1000),
    LtxFamily(1000, 128, 8, 32),
)
STEPS: tuple[Family, ...] = (Sd3Family(1000), CosmosFamily(1000))
# A teacher's scheduler of which nothing may be left in its student's.
BENT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}


def walked(family: Family, plan: Any) -> list[float]:
    """The times that the planned scheduler has after a stock call has set it."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(plan.scheduler.config)
    family.set_timesteps(scheduler, plan.num_inference_steps, sigmas=plan.sigmas)
    return torch.as_tensor(scheduler.sigmas)[:-1].tolist()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*LINSPACE, *STEPS]), st.integers(1, 12), st.floats(0.3, 20.0), st.sampled_from(["sde", "ode"]))
def test_a_shifted_grid_needs_no_argument(family: Family, steps: int, shift: float, sampler: Any) -> None:
    times = step_grid(steps, shift=shift)
    pipeline = PlainPipeline(FlowMatchEulerDiscreteScheduler(**BENT))
    plan = plan_scheduler(pipeline, family, SamplerSpec(times, sampler))
    assert plan.sigmas is None
    assert walked(family, plan) == pytest.approx(times, abs=2e-6)
    assert plan.scheduler.config["stochastic_sampling"] == (sampler == "sde")


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*LINSPACE, *STEPS]), st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6, unique=True))
def test_any_grid_is_an_argument_that_nothing_bends(family: Family, drawn: list[float]) -> None:
    times = (1.0, *sorted(drawn, reverse=True))
    if min(np.diff(times[::-1])) < 1e-4:
        return
    plan = plan_scheduler(GridPipeline(FlowMatchEulerDiscreteScheduler(**BENT)), family, SamplerSpec(times, "ode"))
    assert walked(family, plan) == pytest.approx(times, abs=2e-6)


@pytest.mark.parametrize("family", LINSPACE, ids=lambda family: family.name)
def test_a_plan_for_the_number_of_steps_misses_where_the_call_hands_on_its_own_sigmas(family: Family) -> None:
    """The fault that this planner mends: the stretch to a last time is right for one call and wrong for the other."""
    times = step_grid(4, shift=3.0)
    shift, terminal = euler_scheduler_parameters(4, 3.0)
    made: Any = {"shift": shift, "shift_terminal": terminal}
    scheduler = FlowMatchEulerDiscreteScheduler(**made)
    scheduler.set_timesteps(4)
    assert torch.as_tensor(scheduler.sigmas)[:-1].tolist() == pytest.approx(times, abs=2e-6)
    family.set_timesteps(scheduler, 4)
    off = max(abs(a - b) for a, b in zip(torch.as_tensor(scheduler.sigmas)[:-1].tolist(), times, strict=True))
    assert 5e-3 < off < 0.1


def test_a_student_of_a_grid_that_no_call_steps_on_is_refused_by_name() -> None:
    pipeline = PlainPipeline(FlowMatchEulerDiscreteScheduler())
    grid: Any = SimpleNamespace(steps=4, shift=1.0, times=(1.0, 0.8, 0.7, 0.1), timesteps=None)
    with pytest.raises(ValueError, match=r"PlainPipeline takes no `sigmas`"):
        exportable_times(pipeline, LINSPACE[-1], grid, "ode")
    found = exportable_times(GridPipeline(FlowMatchEulerDiscreteScheduler()), LINSPACE[0], grid, "ode")
    assert found == (1.0, 0.8, 0.7, 0.1)
