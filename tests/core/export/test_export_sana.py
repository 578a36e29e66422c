"""SANA-Sprint students through stock SanaSprintPipeline, compared with our sampler."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, SanaSprintPipeline, SCMScheduler
from torch import nn

from fewstep.core.export.check import ExportMismatchError
from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import StudentReport, read_record
from fewstep.core.export.run import export_run
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.sana import is_sprint_network, sprint_angles, sprint_teacher, sprint_times
from fewstep.core.export.schedulers import nearest_exportable_times, plan_scheduler
from fewstep.core.families.table import build_family
from fewstep.core.networks.lora import add_lora
from fewstep.core.networks.sana_networks import with_guidance_embedding
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import RunSettings
from fewstep.core.teacher import Teacher
from fewstep.core.training.checkpoint import save_checkpoint
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.systems import picture_size, read_system
from tests.tiny_pipelines import build_sd15, save_pipeline
from tests.tiny_sana import build_sana

PROMPTS = ["the digit seven", "a bold two"]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    return save_pipeline(build_sana(dense=True), tmp_path_factory.mktemp("sana"))


def build_student() -> Any:
    """A student that depends on its guidance and differs from its teacher."""
    student = with_guidance_embedding(build_sana(dense=True).transformer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            scale = 0.1 if "guidance_embedder.linear_2" in name else 0.01
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return student


def report(guidance: float = 4.5) -> StudentReport:
    return StudentReport("sana_sprint", "tiny/sana", guidance, 7, False)


def test_times_are_those_of_the_paper_and_of_the_scheduler() -> None:
    assert sprint_times(1) == (1.0,)
    assert sprint_times(2) == pytest.approx((1.0, 0.78271), abs=1e-5)
    assert sprint_times(4) == pytest.approx((1.0, 0.70711, 0.5, 0.29289), abs=1e-5)
    for steps in (1, 2, 3, 4):
        first, middle = sprint_angles(SamplerSpec(sprint_times(steps), "sde"))
        assert first == math.pi / 2
        assert middle == (pytest.approx(1.3) if steps == 2 else None)
        scheduler = SCMScheduler()
        scheduler.set_timesteps(steps, max_timesteps=first, intermediate_timesteps=middle)
        angles = scheduler.timesteps.double()
        assert len(angles) == steps + 1
        times = (angles.sin() / (angles.sin() + angles.cos()))[:-1]
        assert times.tolist() == pytest.approx(list(sprint_times(steps)), abs=1e-6)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sprint_times(0)


def test_grids_that_the_pipeline_has_not_are_named() -> None:
    paper = [math.atan(400), 1.3, 1.1, 0.6]
    times = tuple(math.tan(angle) / (1 + math.tan(angle)) for angle in paper)
    with pytest.raises(ValueError, match=r"use sprint_times\(4\)"):
        sprint_angles(SamplerSpec(times, "sde"))
    with pytest.raises(ValueError, match="fresh noise"):
        sprint_angles(SamplerSpec(sprint_times(2), "ode"))
    assert sprint_angles(SamplerSpec(times[:2], "sde")) == pytest.approx((math.atan(400), 1.3))


@pytest.mark.slow
@pytest.mark.parametrize("times", [sprint_times(1), sprint_times(2), sprint_times(4), (0.9, 0.4)])
def test_stock_pipeline_equals_the_training_sampler(teacher_folder, tmp_path, times) -> None:
    student, steps = build_student(), len(times)
    folder = tmp_path / "export"
    record = export_pipeline(
        str(teacher_folder), student, sampler=SamplerSpec(times, "sde"), output=folder, report=report()
    )
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    assert record.pipeline == "SanaSprintPipeline"
    assert record.scheduler == "SCMScheduler"
    assert record.guidance_scale == 4.5
    assert record.network_timesteps == pytest.approx(times)
    assert read_record(folder) == record
    call = json.loads((folder / "distillation.json").read_text())["call"]
    assert call == {
        "num_inference_steps": steps,
        "guidance_scale": 4.5,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "max_timesteps": pytest.approx(math.atan2(times[0], 1 - times[0])),
        "intermediate_timesteps": pytest.approx(math.atan2(times[1], 1 - times[1])) if steps == 2 else None,
    }
    assert "told the guidance: 4.5" in (folder / "README.md").read_text()
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == SanaSprintPipeline.__name__
    pipeline.set_progress_bar_config(disable=True)
    images: list[Any] = [
        pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), output_type="pt", **{**call, **other}).images
        for other in ({}, {"guidance_scale": 1.0})
    ]
    assert images[0].shape == (2, 3, 32, 32)
    assert (images[0] - images[1]).abs().max() > 1e-4


def test_an_export_can_be_judged(teacher_folder, tmp_path) -> None:
    export_pipeline(
        str(teacher_folder),
        build_student(),
        sampler=SamplerSpec(sprint_times(2), "sde"),
        output=tmp_path / "export",
        report=report(),
    )
    system = read_system(tmp_path / "export")
    assert (system.steps, system.guidance, picture_size(system)) == (2, 4.5, (32, 32))
    pipeline = load_pipeline(system.path)
    arguments = {"seed": 3, "steps": 2, "guidance": 4.5, "grid": system.grid}
    both = generate(pipeline, PROMPTS, indices=[0, 1], **arguments)
    alone = generate(pipeline, PROMPTS[1:], indices=[1], **arguments)
    assert both.shape == (2, 3, 32, 32)
    assert (both[1:] - alone).abs().max() < 1e-5
    # Other steps than those of the record: the second angle is of no use to them.
    assert read_system(tmp_path / "export", steps=4).grid.arguments()["intermediate_timesteps"] is None


def test_a_teacher_can_be_judged(teacher_folder) -> None:
    pipeline: Any = load_pipeline(teacher_folder)
    found = generate(pipeline, PROMPTS, indices=[0, 1], seed=3, steps=3, guidance=2.0)
    teacher = Teacher(pipeline, path="tiny")
    noise = sample_noise(3, [0, 1], (8, 4, 4), stream="latents", device="cpu", dtype=torch.float32)
    latents = teacher.sample(noise, teacher.encode(PROMPTS), steps=3, guidance=2.0)
    assert (found - teacher.decode(latents)).abs().max() < 1e-4


class DoubledOutput(nn.Module):
    """Hook that makes a network do more than its weights say."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return (2 * output[0],)


def test_a_student_that_is_no_stock_network_is_refused(teacher_folder, tmp_path) -> None:
    student = build_student()
    student.register_forward_hook(DoubledOutput())
    with pytest.raises(ExportMismatchError):
        export_pipeline(
            str(teacher_folder),
            student,
            sampler=SamplerSpec(sprint_times(1), "sde"),
            output=tmp_path / "export",
            report=report(),
        )
    assert not (tmp_path / "export").exists()


def test_what_does_not_fit_is_named(teacher_folder, tmp_path) -> None:
    student = build_student()
    assert is_sprint_network(student)
    assert not is_sprint_network(build_sana().transformer)
    slow = Teacher(build_sana(), path="tiny")
    with pytest.raises(ValueError, match="sees 1000 t"):
        sprint_teacher(slow)
    with pytest.raises(ValueError, match="needs a SANA teacher"):
        sprint_teacher(Teacher(build_sd15(), path="tiny"))
    add_lora(student, rank=2, alpha=2, targets=("to_q",), seed=0)
    with pytest.raises(ValueError, match="guidance embedding"):
        export_pipeline(
            str(teacher_folder),
            student,
            sampler=SamplerSpec((1.0,), "sde"),
            output=tmp_path / "export",
            report=report(),
            lora_only=True,
        )


def test_student_without_guidance_embedding_is_an_ordinary_sana_pipeline(teacher_folder, tmp_path) -> None:
    student = build_sana(dense=True, seed=1).transformer
    times = nearest_exportable_times(Teacher.load(teacher_folder).pipeline, (1.0, 0.5))
    record = export_pipeline(
        str(teacher_folder), student, sampler=SamplerSpec(times, "sde"), output=tmp_path / "export", report=report(1.0)
    )
    assert (record.pipeline, record.scheduler) == ("SanaPipeline", "FlowMatchEulerDiscreteScheduler")
    assert record.verification is not None
    assert record.verification.sampler_difference < 2e-5
    assert record.call_arguments()["use_resolution_binning"] is False


@pytest.mark.parametrize(("steps", "times"), [(None, sprint_times(2)), (4, sprint_times(4))])
def test_a_run_is_exported_at_the_pipelines_own_times(teacher_folder, tmp_path, steps, times) -> None:
    run = tmp_path / "sprint"
    weights = {f"network.{name}": tensor for name, tensor in build_student().state_dict().items()}
    save_checkpoint(run, 3, tensors={"student": weights}, state={}, keep=1)
    RunSettings(
        method="sana_sprint",
        teacher_path=str(teacher_folder),
        guidance=4.5,
        steps=2,
        shift=1.0,
        sampler="sde",
        any_steps=True,
        guidance_embedded=True,
    ).save(run)
    _, record = export_run(run, weights="live", steps=steps)
    assert (record.pipeline, record.method, record.guidance_scale) == ("SanaSprintPipeline", "sana_sprint", 4.5)
    assert record.times == times


def test_dpm_solver_with_flow_sigmas_is_a_flow() -> None:
    pipeline: Any = build_sana(dense=True)
    pipeline.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert nearest_exportable_times(pipeline, (1.0, 0.37)) == (1.0, 0.37)
    plan = plan_scheduler(pipeline, build_family(pipeline), SamplerSpec((1.0, 0.5), "sde"))
    assert type(plan.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert plan.network_timesteps == (1.0, 0.5)
