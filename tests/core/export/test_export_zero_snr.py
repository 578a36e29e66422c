"""Exports of students on a noise table with zero terminal SNR."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import Figure, StudentReport
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import nearest_exportable_times, plan_scheduler
from fewstep.core.families.parts.noise_table import noise_table
from fewstep.core.families.table import build_family
from fewstep.core.grids import step_grid
from tests.tiny_pipelines import build_sd15, save_pipeline

REPORT = StudentReport("dmd", "owner/teacher", guidance=3.0, step=7, ema=True, figures=(Figure("FID", 2.5),))


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "steps"), [("sde", 1), ("sde", 3), ("ode", 4)])
def test_v_prediction_with_zero_terminal_snr_exports(tmp_path: Path, sampler: Any, steps: int):
    """The stock schedulers have alpha = 0 at the last entry, and so has the training sampler."""
    pipeline = build_sd15(prediction_type="v_prediction")
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler: Any = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    pipeline.scheduler = scheduler
    assert float(scheduler.alphas_cumprod[-1]) == 0
    folder = save_pipeline(pipeline, tmp_path / "teacher")
    uniform = table_times(pipeline, tuple(1000 // steps * i - 1 for i in range(steps, 0, -1)))
    times = uniform if sampler == "ode" else nearest_exportable_times(pipeline, step_grid(steps))
    record = export_pipeline(
        str(folder), pipeline.unet, sampler=SamplerSpec(times, sampler), output=tmp_path / "out", report=REPORT
    )
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    if sampler == "ode":
        uneven = SamplerSpec(nearest_exportable_times(pipeline, (0.99, 0.4)), "ode")
        with pytest.raises(ValueError, match="zero terminal SNR, on which Euler steps of stock schedulers"):
            plan_scheduler(pipeline, build_family(pipeline), uneven)


def table_times(pipeline: Any, indices: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(noise_table(pipeline.scheduler).to_flow_time(torch.tensor(indices).double()).tolist())
