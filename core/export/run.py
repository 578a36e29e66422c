"""Exports the student of a run directory: reads its configuration and one of its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.export.pipeline import DTYPE_NAMES, export_pipeline
from fewstep.core.export.record import HUB_ID, ExportRecord, StudentReport
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.sana import sprint_times
from fewstep.core.export.schedulers import student_times
from fewstep.core.export.workflow import write_comfyui_files
from fewstep.core.families.sana_control import ControlledSana
from fewstep.core.networks.build import adapted_layers
from fewstep.core.networks.lora import add_lora
from fewstep.core.networks.quantised import Quantisation, dequantise
from fewstep.core.networks.sana_networks import with_guidance_embedding
from fewstep.core.run_settings import RunSettings, Sampler, read_settings
from fewstep.core.settings import ModelSource
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.training.best import best_checkpoint
from fewstep.core.training.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from fewstep.core.training.run_directory import sample_grids
from fewstep.core.two_time import add_second_time
from fewstep.core.weights import EMA_FILE, LIVE_FILE

# A Denoiser's parameters carry the name of its one child.
NETWORK_PREFIX = "network."


@dataclass(frozen=True)
class ExportFiles:
    """How an export is written: `dtype` "float32", "float16" or "bfloat16", `hub_id` of the base model for the card,
    `comfyui` the network in one file too; the others as in `export_pipeline`."""

    dtype: str = "float32"
    overwrite: bool = False
    lora_only: bool = False
    hub_id: str | None = None
    comfyui: bool = False


DEFAULT_FILES = ExportFiles()


def export_run(
    run: str | Path,
    *,
    checkpoint: str = "latest",
    weights: Literal["ema", "live"] = "ema",
    output: str | Path | None = None,
    steps: int | None = None,
    sampler: Literal["sde", "ode"] | None = None,
    device: str = "cpu",
    files: ExportFiles = DEFAULT_FILES,
) -> tuple[Path, ExportRecord]:
    """Export the student of a run; gives the directory that was written and its record.

    Args:
        run: run directory with student.json and checkpoints.
        checkpoint: "latest", "best" by the run's validation, the name of a checkpoint of this run, or a path.
        weights: the moving average or the live weights.
        output: directory to create; by default "export" in the run directory.
        steps: of the exported sampler, if not the run's; for consistency students, which are trained at all times.
        sampler: "ode" for a student that was trained to re-noise ("sde"), where seeds must decide all; None is the
        run's. device: where the comparison runs. files: how the files are written.

    Raises:
        ValueError, FileExistsError, ExportMismatchError: see `export_pipeline`; or a file, key or weight is missing.
    """
    dtypes, dtype = {name: value for value, name in DTYPE_NAMES.items()}, files.dtype
    if files.hub_id is not None and HUB_ID.fullmatch(files.hub_id) is None:
        raise ValueError(f"base_model is {files.hub_id!r}; give the id of a model of the hub, such as owner/name")
    if dtype not in dtypes or weights not in ("ema", "live"):
        raise ValueError(f"dtype {dtype!r} (of {', '.join(dtypes)}) or weights {weights!r} (of ema, live) is unknown")
    run = Path(run)
    settings = with_steps(read_settings(run), steps, run)
    trained, settings = settings.sampler, with_sampler(settings, sampler, run)
    if files.lora_only:
        require_own_base(settings)
    loaded = load_run_student(run, settings, checkpoint=checkpoint, weights=weights, device=device)
    if isinstance(loaded.student.denoiser.network, ControlledSana):
        raise ValueError(f"{run} trained a student with a ControlNet: use scripts/export_sana_control.py")
    report = _report(run, settings, loaded.step, trained_sampler=trained, files=files, ema=weights == "ema")
    output = run / "export" if output is None else Path(output)
    shift = settings.shift if settings.sampler == "flow_map" else None
    record = export_pipeline(
        settings.base,
        loaded.student.denoiser.network,
        sampler=SamplerSpec(loaded.student.times, settings.sampler, shift),
        output=output,
        report=report,
        dtype=dtypes[dtype],
        overwrite=files.overwrite,
        lora_only=files.lora_only,
    )
    if files.comfyui or files.lora_only:
        write_comfyui_files(output)
    return output, record


def _report(
    run: Path, settings: RunSettings, step: int, *, trained_sampler: Sampler, files: ExportFiles, ema: bool
) -> StudentReport:
    """What the card says of the training."""
    return StudentReport(
        method=settings.method,
        base_model=settings.base.path,
        teacher_model=settings.teacher_path,
        guidance=settings.guidance,
        step=step,
        ema=ema,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        name=run.resolve().name,
        base_dtype=settings.teacher_dtype if settings.lora_rank > 0 else "float32",
        hub_id=files.hub_id,
        picture=newest_grid(run, step),
        training_sampler=trained_sampler,
    )


def newest_grid(run: Path, step: int) -> tuple[Path, int] | None:
    """The newest grid of samples up to a step of the training, and its step; None where a run has none."""
    grids = dict(sample_grids(run))
    # That of the start shows a student that has learnt nothing.
    fit = [number for number in grids if 0 < number <= step]
    return (grids[max(fit)], max(fit)) if fit else None


def require_own_base(settings: RunSettings) -> None:
    """Raises ValueError for adapters that sit on other weights than a user would load them on."""
    unlike = f"teacher.lora {settings.base.lora}" if settings.base.lora is not None else None
    if settings.teacher_quantise != "none" and settings.student_path is None:
        unlike = f"teacher.quantise {settings.teacher_quantise}"
    if unlike is not None:
        raise ValueError(
            f"lora_only with {unlike}: the adapters were trained on other weights than a user would load them on; "
            "export them merged"
        )


@dataclass(frozen=True)
class RunStudent:
    """The student of a run beside its teacher, and the step of the training that its weights are of."""

    teacher: Teacher
    student: Student
    step: int


def load_run_student(
    run: Path, settings: RunSettings, *, checkpoint: str = "latest", weights: str = "ema", device: str = "cpu"
) -> RunStudent:
    """The student as it samples in training, from a checkpoint of a run; the arguments of `export_run`.

    Raises:
        ValueError: a file or weight is missing, or does not fit the teacher.
    """
    loaded = load_checkpoint(find_checkpoint(run, checkpoint))
    name = EMA_FILE if weights == "ema" else LIVE_FILE
    if name not in loaded.tensors:
        raise ValueError(f"the checkpoint has no {name}.safetensors, only {', '.join(loaded.tensors)}; change weights")
    bits = settings.teacher_quantise if settings.student_path is None else "none"
    teacher = load_base(settings.base, settings.teacher_dtype, bits, has_adapters=settings.lora_rank > 0, device=device)
    network = _student_network(teacher, settings, loaded.tensors[name])
    sprint = settings.guidance_embedded
    times = sprint_times(settings.steps) if sprint else student_times(teacher.pipeline, settings)
    return RunStudent(teacher, Student(Denoiser(network, teacher.family), times, settings.sampler), loaded.step)


def load_base(source: ModelSource, dtype: str, quantised: Quantisation, *, has_adapters: bool, device: str) -> Teacher:
    """The pipeline that a student is of, in fp32; its network has the values on which adapters were trained, which are
    rounded to `dtype` and `quantised`. Raises ValueError as `Teacher.load`."""
    kept = getattr(torch, dtype) if has_adapters else None
    teacher = Teacher.load(source, device=device, network_dtype=kept, quantised=quantised if has_adapters else "none")
    dequantise(teacher.denoiser.network)
    teacher.denoiser.float()
    return teacher


def with_steps(settings: RunSettings, steps: int | None, run: Path) -> RunSettings:
    """The settings, with another number of steps if one is given. Raises ValueError for a student of one grid."""
    steps = settings.steps if steps is None else steps
    if steps != settings.steps and not settings.any_steps:
        raise ValueError(
            f"steps is {steps}, but {run} trained a student of {settings.steps} steps by {settings.method}, at those "
            f"times alone; train one of {steps} steps, or one by consistency or a flow map, which takes any number"
        )
    if steps == settings.steps:
        return settings
    return replace(settings, steps=steps, times=None, timesteps=None)


def with_sampler(settings: RunSettings, sampler: Literal["sde", "ode"] | None, run: Path) -> RunSettings:
    """The settings, with another sampler if one is given. Raises ValueError for a student that has its own alone."""
    if sampler is None or sampler == settings.sampler:
        return settings
    if settings.sampler != "sde" or settings.guidance_embedded:
        raise ValueError(
            f"sampler is {sampler!r}, but {run} trained a student of the sampler {settings.sampler!r} by "
            f"{settings.method}, which samples in no other way; leave it out"
        )
    return replace(settings, sampler=sampler)


def find_checkpoint(run: Path, checkpoint: str) -> Path:
    """A checkpoint of a run by name, by path, the latest, or its best weights. Raises ValueError that names those there
    are."""
    known = ", ".join(path.name for path in list_checkpoints(run)) or "none"
    if checkpoint == "best":
        found = best_checkpoint(run)
        if found is None:
            raise ValueError(f"{run} holds no best weights: a run with the section validation keeps them; use latest")
        return found
    if checkpoint == "latest":
        found = latest_checkpoint(run)
        if found is None:
            raise ValueError(f"{run} holds no checkpoint; train first, or give the path of a checkpoint")
        return found
    for path in (run / checkpoint, Path(checkpoint)):
        if path.is_dir():
            return path
    raise ValueError(f"there is no checkpoint {checkpoint}; checkpoints of {run}: {known}")


def _student_network(teacher: Teacher, settings: RunSettings, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The teacher's network with the student's adapters, if any, and its weights."""
    network = teacher.denoiser.network
    if settings.guidance_embedded and not isinstance(network, ControlledSana):
        assert isinstance(network, SanaTransformer2DModel)
        network = with_guidance_embedding(network)
    network.requires_grad_(True)
    if settings.lora_rank > 0:
        targets = adapted_layers(network, teacher.family, settings.lora_targets)
        add_lora(network, rank=settings.lora_rank, alpha=settings.lora_alpha, targets=targets, seed=0)
    if settings.second_time != "none":
        add_second_time(network, settings.second_time)
    plain = {name.removeprefix(NETWORK_PREFIX): tensor for name, tensor in tensors.items()}
    # A LoRA student stores its adapters alone; what stays the teacher's is exactly what was not trained.
    # Computed tables that older runs saved beside their adapters.
    computed = {name for name, _ in network.named_buffers()} - network.state_dict().keys()
    plain = {name: tensor for name, tensor in plain.items() if name not in computed}
    missing, unexpected = network.load_state_dict(plain, strict=False)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    lost = sorted(trained & set(missing))
    if lost or unexpected:
        raise ValueError(
            f"the weights do not fit the teacher at {settings.teacher_path}: {len(lost)} missing {lost[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}. Was it exchanged, or student.lora_rank changed?"
        )
    return network.eval()
