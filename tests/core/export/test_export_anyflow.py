"""Wan students of two times as stock AnyFlowPipeline: the same function, at any number of steps, from one export."""

# diffusers annotates narrower types than it takes.
# pyright: reportArgumentType=false

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMapEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.export.anyflow import anyflow_network, is_anyflow_student, plan_anyflow
from fewstep.core.export.model_card import loading_snippet
from fewstep.core.export.pipeline import export_pipeline
from fewstep.core.export.record import StudentReport, read_record
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.families.table import build_family
from fewstep.core.grids import step_grid
from fewstep.core.networks.lora import add_lora
from fewstep.core.student import Student
from fewstep.core.two_time import SecondTime, add_second_time
from tests.tiny_pipelines import build_sd3, save_pipeline
from tests.tiny_videos import TEXT_WIDTH, VIDEO_FRAMES, VIDEO_LATENTS, VIDEO_SIDE, build_video_pipeline

PROMPTS = ["a red house", "x"]
SHIFT, STEPS = 3.0, (1, 2, 4, 8)
REPORT = StudentReport(
    "anyflow", "tiny", guidance=1.0, step=7, ema=True, height=VIDEO_SIDE, width=VIDEO_SIDE, frames=VIDEO_FRAMES
)
CALL: Any = {"height": VIDEO_SIDE, "width": VIDEO_SIDE, "num_frames": VIDEO_FRAMES, "max_sequence_length": 8}
Kind = Literal["gate", "sum"]


def two_time_wan(kind: SecondTime, *, lora: bool = False, expand_timesteps: bool = False) -> Any:
    """The tiny Wan with a second time, after some training, here noise on every weight."""
    pipeline: Any = build_video_pipeline(text_tokens=8, expand_timesteps=expand_timesteps)
    network = pipeline.transformer
    if lora:
        add_lora(network, rank=2, alpha=4.0, targets=build_family(pipeline).lora_targets, seed=0)
    add_second_time(network, kind)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@torch.no_grad()
def own_samples(network: Any, times: tuple[float, ...], noise: Tensor, *, expand_timesteps: bool = False) -> Tensor:
    """Latents of the training sampler."""
    source = build_video_pipeline(text_tokens=8, expand_timesteps=expand_timesteps)
    family = build_family(source)
    return Student(Denoiser(network, family), times, "flow_map").sample(noise, family.encode_prompts(source, PROMPTS))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tiny Wans on disk: of the 2.1 kind, and of the 2.2 kind, which is told a time per token."""
    folder = tmp_path_factory.mktemp("teachers")
    return {
        expand: save_pipeline(
            build_video_pipeline(text_tokens=8, shift=SHIFT, expand_timesteps=expand), folder / f"wan_{expand}"
        )
        for expand in (False, True)
    }


@pytest.mark.parametrize("kind", ["gate", "sum"])
def test_the_stock_network_is_the_same_function(kind: Kind) -> None:
    network = two_time_wan(kind)
    stock = anyflow_network(network)
    family = build_family(build_video_pipeline(text_tokens=8))
    generator = torch.Generator().manual_seed(1)
    x_t, tokens = (
        torch.randn(3, *VIDEO_LATENTS, generator=generator),
        torch.randn(3, 8, TEXT_WIDTH, generator=generator),
    )
    t, r = torch.tensor([1.0, 0.7, 0.31]), torch.tensor([0.0, 0.7, 0.3])
    per_frame: Any = {
        "timestep": 1000 * t[:, None].expand(-1, VIDEO_LATENTS[1]),
        "r_timestep": 1000 * r[:, None].expand(-1, VIDEO_LATENTS[1]),
    }
    with torch.no_grad():
        own = Denoiser(network, family)(x_t, t, Condition(tokens), r)
        other = Denoiser(network, family)(x_t, t, Condition(tokens), t)
        found = stock(x_t.transpose(1, 2), **per_frame, encoder_hidden_states=tokens, return_dict=False)[0]
    assert found.shape == (3, 3, 4, 8, 8)
    assert (found.transpose(1, 2) - own).abs().max() < 1e-5 * own.abs().max()
    assert (other[0] - own[0]).abs().max() > 1e-2 * own.abs().max()
    assert (stock.config["gate_value"], stock.config["deltatime_type"]) == {"gate": (0.25, "r"), "sum": (0.5, "t-r")}[
        kind
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "expand"), [("gate", False), ("sum", False), ("gate", True)])
def test_one_export_serves_all_numbers_of_steps(
    teachers: dict[bool, Path], tmp_path: Path, kind: Kind, expand: bool
) -> None:
    network = two_time_wan(kind, expand_timesteps=expand)
    spec = SamplerSpec(step_grid(4, shift=SHIFT), "flow_map", SHIFT)
    record = export_pipeline(str(teachers[expand]), network, sampler=spec, output=tmp_path / "export", report=REPORT)
    assert (record.pipeline, record.scheduler) == ("AnyFlowPipeline", "FlowMapEulerDiscreteScheduler")
    assert record.any_steps
    assert read_record(tmp_path / "export") == record
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    assert record.verification.rounding_difference == 0.0
    assert record.call_arguments() == {"num_inference_steps": 4, "guidance_scale": 1.0, **CALL}
    assert ".frames[0]" in loading_snippet(record, "here")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert type(pipeline).__name__ == "AnyFlowPipeline"
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *VIDEO_LATENTS, generator=torch.Generator().manual_seed(1))
    samples = []
    for steps in STEPS:
        found = pipeline(PROMPTS, latents=noise.clone(), output_type="latent", num_inference_steps=steps, **CALL).frames
        expected = own_samples(network, step_grid(steps, shift=SHIFT), noise, expand_timesteps=expand)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        samples.append(found)
    assert (samples[0] - samples[-1]).abs().max() > 1e-2


def test_weights_come_back_from_disk(teachers: dict[bool, Path], tmp_path: Path) -> None:
    network = two_time_wan("gate")
    spec = SamplerSpec(step_grid(2), "flow_map")
    export_pipeline(str(teachers[False]), network, sampler=spec, output=tmp_path / "export", report=REPORT)
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stored, own = pipeline.transformer.state_dict(), network.state_dict()
    site = "condition_embedder.time_embedder"
    renamed = {
        name.replace("delta_embedder", "time_embedder.second").replace(f"{site}.linear", f"{site}.first.linear"): tensor
        for name, tensor in stored.items()
    }
    assert renamed.keys() == own.keys()
    assert [name for name, tensor in own.items() if not torch.equal(tensor, renamed[name])] == []
    assert pipeline.transformer.condition_embedder.delta_emb_gate.tolist() == [0.25]


def test_a_one_step_export_keeps_the_shift(teachers: dict[bool, Path], tmp_path: Path) -> None:
    network = two_time_wan("gate", lora=True)
    spec = SamplerSpec((1.0,), "flow_map", SHIFT)
    record = export_pipeline(str(teachers[False]), network, sampler=spec, output=tmp_path / "one", report=REPORT)
    assert record.weights == "merged"
    scheduler: Any = FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path / "one", subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(step_grid(4, shift=SHIFT), abs=1e-12)


def test_other_grids_go_into_the_call(teachers: dict[bool, Path], tmp_path: Path) -> None:
    spec = SamplerSpec((1.0, 0.9, 0.2), "flow_map")
    record = export_pipeline(
        str(teachers[False]), two_time_wan("sum"), sampler=spec, output=tmp_path / "odd", report=REPORT
    )
    assert record.sigmas == (1.0, 0.9, 0.2)
    assert not record.any_steps
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5


@given(st.integers(1, 50), st.floats(1.0, 12.0))
@settings(max_examples=40, deadline=None)
def test_the_schedulers_grid_is_the_students(steps: int, shift: float) -> None:
    plan = plan_anyflow(build_grid_pipeline(), SamplerSpec(step_grid(steps, shift=shift), "flow_map", shift))
    plan.scheduler.set_timesteps(steps)
    assert plan.scheduler.sigmas[:-1].tolist() == pytest.approx(step_grid(steps, shift=shift), abs=2e-6)
    assert plan.network_timesteps == tuple(1000 * time for time in step_grid(steps, shift=shift))


def build_grid_pipeline() -> Any:
    """One pipeline for all examples."""
    if not GRID_PIPELINE:
        GRID_PIPELINE.append(build_video_pipeline(text_tokens=8))
    return GRID_PIPELINE[0]


GRID_PIPELINE: list[Any] = []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_stay_near(teachers: dict[bool, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    record = export_pipeline(
        str(teachers[False]),
        two_time_wan("sum"),
        sampler=SamplerSpec(step_grid(2), "flow_map"),
        output=tmp_path / "half",
        report=REPORT,
        dtype=dtype,
    )
    assert record.verification is not None
    assert 1e-6 < record.verification.rounding_difference < record.verification.rounding_tolerance


@pytest.mark.parametrize(("steps", "dtype"), [(1, torch.float32), (2, torch.float32), (4, torch.bfloat16)])
def test_students_of_one_time_stay_wan_pipelines(
    teachers: dict[bool, Path], tmp_path: Path, steps: int, dtype: torch.dtype
) -> None:
    network: Any = build_video_pipeline(text_tokens=8, seed=1).transformer
    spec = SamplerSpec(step_grid(steps, shift=5.0), "sde")
    record = export_pipeline(
        str(teachers[False]), network, sampler=spec, output=tmp_path / "wan", report=REPORT, dtype=dtype
    )
    assert record.pipeline == "WanPipeline"
    assert record.step_noise == ("none" if steps == 1 else "global")
    assert record.verification is not None
    assert record.verification.sampler_difference < 1e-5
    assert record.call_arguments() == {"num_inference_steps": steps, "guidance_scale": 1.0, **CALL}
    assert not record.any_steps


def test_frames_belong_to_videos(tmp_path: Path) -> None:
    teacher = save_pipeline(build_sd3(), tmp_path / "sd3")
    report = StudentReport("dcm", "tiny", guidance=1.0, step=7, ema=True, frames=9)
    with pytest.raises(ValueError, match="frames is 9, and a teacher of the family sd3 makes pictures"):
        export_pipeline(
            str(teacher),
            build_sd3().transformer,
            sampler=SamplerSpec((1.0,), "sde"),
            output=tmp_path / "no",
            report=report,
        )


def test_what_does_not_fit_is_named(teachers: dict[bool, Path], tmp_path: Path) -> None:
    plain: Any = build_video_pipeline(text_tokens=8)
    assert not is_anyflow_student(plain.transformer)
    assert not is_anyflow_student(build_sd3().transformer)
    with pytest.raises(ValueError, match="this is a WanTransformer3DModel of one or another kind"):
        anyflow_network(plain.transformer)
    network = two_time_wan("gate")
    network.register_to_config(image_dim=16)
    with pytest.raises(ValueError, match=r"this network has \{'image_dim': 16\}"):
        anyflow_network(network)
    with pytest.raises(ValueError, match="use 'flow_map'"):
        plan_anyflow(plain, SamplerSpec((1.0,), "ode"))
    with pytest.raises(ValueError, match=r"the shift 5\.0 makes the grid \(1\.0, 0\.83"):
        plan_anyflow(plain, SamplerSpec((1.0, 0.5), "flow_map", 5.0))
    spec = SamplerSpec(step_grid(2), "flow_map")
    network = two_time_wan("gate", lora=True)
    with pytest.raises(ValueError, match="lora_only cannot hold a second time"):
        export_pipeline(
            str(teachers[False]), network, sampler=spec, output=tmp_path / "no", report=REPORT, lora_only=True
        )
    assert not (tmp_path / "no").exists()
