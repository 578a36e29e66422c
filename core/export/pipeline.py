"""A student becomes a diffusers directory that stock diffusers loads without this package."""

import copy
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from fewstep.core.export.adapters import load_adapter_files, write_adapters
from fewstep.core.export.anyflow import anyflow_pipeline, is_anyflow_student, plan_anyflow
from fewstep.core.export.check import (
    ExportMismatchError,
    Probe,
    check_timesteps,
    make_probe,
    pipeline_latents,
    relative_difference,
    training_latents,
)
from fewstep.core.export.components import absent_components
from fewstep.core.export.contract import keep_call, keep_vllm_call
from fewstep.core.export.directory import check_finite, check_output, new_directory, remove_machine_names
from fewstep.core.export.model_card import license_of, write_model_card
from fewstep.core.export.record import (
    PICTURE_FILE,
    ExportRecord,
    StudentReport,
    Verification,
    hub_id_of,
    public_name,
    write_record,
)
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.sana import is_sprint_network, sprint_teacher
from fewstep.core.export.schedulers import SchedulerPlan, plan_scheduler
from fewstep.core.export.second_time import bake_second_time
from fewstep.core.families.table import loading_arguments
from fewstep.core.networks.guidance_off import with_guidance_off
from fewstep.core.networks.lora import lora_state_dict, merge_lora
from fewstep.core.settings import ModelSource
from fewstep.core.teacher import Teacher
from fewstep.core.two_time import second_time_of
from fewstep.core.weights import LORA_FILES

# Guidance is in the weights: u + 1 (c - u), for which the stock call makes no second network call.
GUIDANCE_OFF = 1.0
# The pipeline and the training sampler do the same fp32 arithmetic in another order. Consistency students amplify its
# rounding most: 1.06e-5 was seen. A wrong grid, scheduler or text differs by a hundred times more.
SAMPLER_TOLERANCE = 3e-5
# Rounding of weights and text encoders, of the largest latent: some tens of the dtype's relative precision.
ROUNDING_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
DTYPE_NAMES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
# Arguments of a call that a record has by name.
NAMED_ARGUMENTS = ("height", "width", "num_frames", "max_sequence_length", "use_resolution_binning")
LIBRARIES = ("fewstep", "diffusers", "transformers", "torch", "peft", "safetensors")


@dataclass(frozen=True)
class _Job:
    """What the steps of one export share. `dtype` is that of the files."""

    teacher: Teacher
    teacher_path: str | ModelSource
    spec: SamplerSpec
    plan: SchedulerPlan
    report: StudentReport
    dtype: torch.dtype
    probe: Probe
    lora_only: bool
    pipeline_name: str

    @property
    def guidance_scale(self) -> float:
        """The scale that its network is told, else 1."""
        told = self.teacher.family.told_guidance if self.probe.guidance is None else self.probe.guidance
        return GUIDANCE_OFF if told is None else told

    @property
    def guidance(self) -> dict[str, Any]:
        """What the pipeline is called with."""
        if self.probe.guidance is not None:
            return {"guidance_scale": self.probe.guidance}
        return self.teacher.family.guidance_arguments(GUIDANCE_OFF)


def export_pipeline(
    teacher_path: str | ModelSource,
    network: nn.Module,
    *,
    sampler: SamplerSpec,
    output: str | Path,
    report: StudentReport,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    lora_only: bool = False,
) -> ExportRecord:
    """Write a student as a diffusers directory, load it again and compare it with the sampler of the training.

    The directory holds the teacher's pipeline with the student's weights (adapters merged) and a stock scheduler that
    steps on `sampler.times`. A second time of the network becomes part of its time layers, for these times alone; for
    Wan it stays, in an AnyFlowPipeline, which takes any number of steps.
    `distillation.json` and README.md say what to pass to the pipeline. With `lora_only` it
    holds `pytorch_lora_weights.safetensors` and the scheduler, to be loaded on top of the teacher, and where ComfyUI
    knows the model comfyui/lora.safetensors. It appears at
    `output` only after the comparison: latents to 3e-5 of the largest in fp32 arithmetic, timesteps to 1e-3.

    Args:
        teacher_path: diffusers directory or hub id of the teacher pipeline, or where it is in more words.
        network: the student's diffusers network, with or without adapters; it is not changed. The work happens on its
            device.
        sampler: the times at which the student was trained to step, and how.
        output: directory to create.
        report: what the model card says about the training.
        dtype: torch.float32, float16 or bfloat16 of the files.
        overwrite: replace an earlier export at `output`.
        lora_only: write the adapters alone.

    Raises:
        ValueError: an argument cannot be used, or no stock scheduler steps on this grid with this pipeline.
        FileExistsError: `output` exists and `overwrite` is not given.
        ExportMismatchError: the loaded export differs from the training sampler; nothing is left at `output`.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    # Networks are initialised at random before their weights are loaded; the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        job = _prepare(teacher_path, network, spec=sampler, report=report, dtype=dtype, lora_only=lora_only)
        return _export(job, network, output)


def _export(job: _Job, network: nn.Module, output: Path) -> ExportRecord:
    trained = copy.deepcopy(network).float().eval()
    trained_latents = _training_latents(job, trained)
    stored = _rounded_adapters(trained, job.dtype) if job.lora_only else _plain_network(trained, job)
    record = _record(job, name=job.report.name or output.name)
    keep_call(job.plan.scheduler, record.call_arguments())
    with new_directory(output) as draft:
        if job.lora_only:
            write_adapters(job.teacher, stored, draft, dtype=job.dtype)
            job.plan.scheduler.save_pretrained(draft / "scheduler")
        else:
            _write_pipeline(job, stored, draft)
        remove_machine_names(draft, public_name(job.report.base_model))
        stored_latents = _training_latents(job, _with_exact_tables(stored.float(), trained))
        verification = _verify(job, draft, stored_latents=stored_latents, trained_latents=trained_latents)
        record = replace(record, verification=verification)
        write_record(record, draft)
        if job.report.picture is not None:
            shutil.copyfile(job.report.picture[0], draft / PICTURE_FILE)
        write_model_card(record, draft, license_fields=license_of(job.teacher.path))
    return record


def _prepare(
    teacher_path: str | ModelSource,
    network: nn.Module,
    *,
    spec: SamplerSpec,
    report: StudentReport,
    dtype: torch.dtype,
    lora_only: bool,
) -> _Job:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype is {dtype}, allowed are {', '.join(str(name) for name in DTYPE_NAMES)}.")
    if lora_only and not hasattr(network, "peft_config"):
        raise ValueError("lora_only is given, but the network has no adapters. Train with student.lora_rank > 0.")
    two_times = second_time_of(network) is not None
    if two_times != (spec.sampler == "flow_map"):
        raise ValueError(
            f"sampler {spec.sampler!r} with a network of {2 if two_times else 1} time(s): 'flow_map' belongs to "
            "networks of two times, and they to it."
        )
    if lora_only and two_times:
        raise ValueError("lora_only cannot hold a second time, which goes into the time layers: export it merged.")
    device = next(network.parameters()).device
    teacher = Teacher.load(teacher_path, device=device)
    if lora_only and not hasattr(teacher.pipeline, "load_lora_weights"):
        raise ValueError(
            f"lora_only is given, and {type(teacher.pipeline).__name__} cannot load adapters: export them merged"
        )
    is_sprint = is_sprint_network(network)
    if is_sprint and lora_only:
        raise ValueError(
            "lora_only cannot hold a guidance embedding, which the teacher does not have: export it merged."
        )
    if is_sprint:
        teacher = sprint_teacher(teacher)
    expected = teacher.family.network(teacher.pipeline)
    if type(network) is not type(expected):
        raise ValueError(
            f"the student is a {type(network).__name__}, the teacher's network a {type(expected).__name__}. Give the "
            "diffusers network itself, without wrappers."
        )
    any_step = is_anyflow_student(network)
    plan = (
        plan_anyflow(cast(Any, teacher.pipeline), spec)
        if any_step
        else plan_scheduler(teacher.pipeline, teacher.family, spec)
    )
    size = {"frames": report.frames, "height": report.height, "width": report.width}
    probe = make_probe(teacher.pipeline, teacher.family, spec=spec, device=device, **size)
    if teacher.family.has_guidance_embedding(network):
        probe = replace(probe, guidance=report.guidance)
    pipeline_name = "AnyFlowPipeline" if any_step else type(teacher.pipeline).__name__
    return _Job(teacher, teacher_path, spec, plan, report, dtype, probe, lora_only, pipeline_name)


def _plain_network(trained: nn.Module, job: _Job) -> Any:
    """A network with the weights of `trained` in the files' dtype, adapters merged: a stock one with the second time
    baked in, or a Wan of two times, which its own pipeline is written with."""
    merged, dtype = copy.deepcopy(trained), job.dtype
    if hasattr(trained, "peft_config"):
        merge_lora(merged)
    if is_anyflow_student(merged):
        merged = merged.to(dtype)
        check_finite(merged.state_dict(), dtype)
        return merged
    if second_time_of(merged) is not None:
        bake_second_time(merged, job.plan.network_timesteps)
    family = job.teacher.family
    plain = family.assembled({name: _stock_copy(part, dtype) for name, part in family.parts(merged).items()})
    check_finite(plain.state_dict(), dtype)
    return plain


def _stock_copy(network: Any, dtype: torch.dtype) -> Any:
    """A stock network with these weights."""
    plain = type(network).from_config(network.config)
    plain.load_state_dict(network.state_dict())
    plain = plain.to(device=next(network.parameters()).device, dtype=dtype).eval()
    return with_guidance_off(plain) if isinstance(plain, UNet2DConditionModel) else plain


def _with_exact_tables(stored: nn.Module, trained: nn.Module) -> nn.Module:
    """`stored` with the tables of `trained` that are computed and not saved, which rounding its weights has rounded."""
    exact, saved = dict(trained.named_buffers()), stored.state_dict().keys()
    for name, buffer in stored.named_buffers():
        if name not in saved and name in exact:
            buffer.copy_(exact[name])
    return stored


def _rounded_adapters(trained: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`trained` with its adapters rounded to `dtype`, in fp32."""
    rounded = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parameter.to(dtype))
    check_finite(lora_state_dict(rounded), dtype)
    return rounded


def _write_pipeline(job: _Job, stored: nn.Module, draft: Path) -> None:
    """Save the teacher's pipeline with the student in it. All its modules end in fp32, rounded to the files' dtype."""
    pipeline: Any = job.teacher.pipeline
    absent = job.teacher.family.stand_ins(pipeline, absent_components(pipeline))
    if is_anyflow_student(stored):
        pipeline = anyflow_pipeline(pipeline, stored, job.plan.scheduler)
    else:
        networks = job.teacher.family.parts(stored)
        pipeline.register_modules(**networks, scheduler=job.plan.scheduler, **absent)
        job.teacher.family.mark_student(pipeline)
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    if job.dtype != torch.float32:
        for module in modules:
            module.to(job.dtype)
    pipeline.save_pretrained(draft, safe_serialization=True)
    if job.pipeline_name == "WanPipeline" and job.spec.sampler != "flow_map":
        call = {"timesteps": job.plan.network_timesteps, "sampler": job.spec.sampler, "guidance": job.guidance_scale}
        keep_vllm_call(draft, **call)
    for module in modules:
        module.float()
    # the training did without them, and so does the comparison
    pipeline.register_modules(**dict.fromkeys(absent))


def _training_latents(job: _Job, network: nn.Module) -> Tensor:
    # A network that is told a thousand times a difference of times turns the last digit of a time into one of its
    # latents: both step at the times as the scheduler rounds them, which lie within GRID_TOLERANCE of the trained ones.
    spec = replace(job.spec, times=job.plan.step_times or job.spec.times)
    return training_latents(network, job.teacher.family, pipeline=job.teacher.pipeline, spec=spec, probe=job.probe)


def _verify(job: _Job, draft: Path, *, stored_latents: Tensor, trained_latents: Tensor) -> Verification:
    pipeline = _load(job, draft).to(job.probe.latents.device)
    latents, seen = pipeline_latents(
        pipeline,
        job.teacher.family,
        job.plan,
        job.probe,
        guidance=job.guidance,
        networks=tuple(job.teacher.family.parts(job.teacher.denoiser.network)),
    )
    check_timesteps(seen, job.plan)
    verification = Verification(
        sampler_difference=relative_difference(latents, stored_latents),
        sampler_tolerance=SAMPLER_TOLERANCE,
        rounding_difference=relative_difference(stored_latents, trained_latents),
        rounding_tolerance=ROUNDING_TOLERANCES[job.dtype],
    )
    if not verification.sampler_difference <= verification.sampler_tolerance:
        raise ExportMismatchError(
            f"the exported pipeline and the training sampler differ by {verification.sampler_difference:.3e} of the "
            f"largest latent (allowed {verification.sampler_tolerance:.0e}) from the same latents, prompts and noise, "
            f"sampler {job.spec.sampler}, times {job.spec.times}, {type(job.plan.scheduler).__name__}."
        )
    if not verification.rounding_difference <= verification.rounding_tolerance:
        raise ExportMismatchError(
            f"the weights as stored ({DTYPE_NAMES[job.dtype]}) move the latents by "
            f"{verification.rounding_difference:.3e} of the largest (allowed {verification.rounding_tolerance:.0e}). "
            "Export with a wider dtype; in float32 it means that the network does more than its weights say."
        )
    return verification


def _load(job: _Job, draft: Path) -> Any:
    """The export as a user would load it, in fp32: diffusers casts to that by default, transformers does not."""
    if not job.lora_only:
        # What an export leaves to those who load it, such as a guardrail, stands in here.
        return DiffusionPipeline.from_pretrained(draft, dtype=torch.float32, **loading_arguments(job.pipeline_name))
    base = Teacher.load(job.teacher_path, network_dtype=getattr(torch, job.report.base_dtype))
    base.denoiser.float()
    pipeline: Any = base.pipeline
    load_adapter_files(pipeline, draft)
    pipeline.register_modules(scheduler=type(job.plan.scheduler).from_pretrained(draft, subfolder="scheduler"))
    return pipeline


def _record(job: _Job, *, name: str) -> ExportRecord:
    """What the export will say of itself, before it was compared."""
    report, plan = job.report, job.plan
    source = job.teacher.pipeline
    size = job.teacher.family.call_arguments(source, height=report.height, width=report.width, frames=report.frames)
    return ExportRecord(
        name=name,
        method=report.method,
        base_model=report.hub_id or hub_id_of(report.base_model) or public_name(report.base_model),
        steps=job.spec.steps,
        sampler=job.spec.sampler,
        times=job.spec.times,
        network_timesteps=plan.network_timesteps,
        training_guidance=report.guidance,
        num_inference_steps=plan.num_inference_steps,
        guidance_scale=job.guidance_scale,
        guidance_arguments=job.guidance,
        example_call=job.teacher.family.example_call,
        told_picture=job.teacher.family.takes_picture,
        lora_files=LORA_FILES[: len(job.teacher.family.parts(job.teacher.denoiser.network))] if job.lora_only else (),
        other_arguments={name: value for name, value in size.items() if name not in NAMED_ARGUMENTS},
        sigmas=plan.sigmas,
        timesteps=plan.timesteps,
        height=size.get("height"),
        width=size.get("width"),
        max_timesteps=plan.max_timesteps,
        intermediate_timesteps=plan.intermediate_timesteps,
        use_resolution_binning=size.get("use_resolution_binning"),
        num_frames=size.get("num_frames"),
        max_sequence_length=size.get("max_sequence_length"),
        step_noise=plan.step_noise,
        pipeline=job.pipeline_name,
        scheduler=type(plan.scheduler).__name__,
        weights="lora" if job.lora_only else "merged",
        base_dtype=report.base_dtype,
        teacher_model=None if report.teacher_model in (None, report.base_model) else public_name(report.teacher_model),
        base_model_id=report.hub_id or hub_id_of(report.base_model),
        training_sampler=None
        if report.training_sampler in (None, job.spec.sampler) or job.spec.steps == 1
        else report.training_sampler,
        picture_step=None if report.picture is None else report.picture[1],
        dtype=DTYPE_NAMES[job.dtype],
        absent_components=absent_components(job.teacher.pipeline),
        training_step=report.step,
        ema=report.ema,
        figures=report.figures,
        verification=None,
        versions=tuple((library, version(library)) for library in LIBRARIES),
    )
