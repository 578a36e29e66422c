"""SANA-Sprint students with a ControlNet as stock SanaControlNetPipeline (arXiv:2503.09641).

No stock pipeline joins SANA-Sprint and a ControlNet. The student of one guidance scale is rectified flow with dense
time, so SanaControlNetPipeline runs it with a FlowMatchEulerDiscreteScheduler that re-noises, of one training step
(its times are then t itself), and is called with the times as `sigmas` and guidance 1. Not every angle has to be one
of SanaSprintPipeline's here, but the times are those of `sprint_times` all the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fewstep.core.export.check import ExportMismatchError
from fewstep.core.export.run import load_run_student, with_steps
from fewstep.core.families.sana_control import ControlledSana
from fewstep.core.randomness import sample_noise
from fewstep.core.run_settings import read_settings
from fewstep.core.student import Student
from fewstep.core.teacher import Teacher
from fewstep.core.training.sample_grid import save_grid

CALL_FILE = "control_call.json"
TOLERANCE = 1e-4
CHECKED_PROMPTS = ("the digit three", "a bold seven")
SEED = 0


@dataclass(frozen=True)
class ControlCall:
    """What the exported pipeline is called with beside `prompt` and `control_image`, and where its weights are from."""

    sigmas: tuple[float, ...]
    height: int
    width: int
    training_guidance: float
    training_step: int
    sampler_difference: float
    guidance_scale: float = 1.0
    use_resolution_binning: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call."""
        return {
            "sigmas": list(self.sigmas),
            "num_inference_steps": len(self.sigmas),
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "use_resolution_binning": self.use_resolution_binning,
        }


def export_control_run(
    run: str | Path, output: str | Path, *, steps: int | None = None, checkpoint: str = "latest", weights: str = "ema"
) -> ControlCall:
    """Write the student of a run with a ControlNet as a pipeline folder with `control_call.json`; returns the call.

    The folder is loaded again and its latents compared with those of the training sampler first; it is removed when
    they differ.

    Raises:
        ValueError: a file is missing, or the student has no ControlNet. FileExistsError: `output` exists.
        ExportMismatchError: the pipeline and the training sampler differ.
    """
    run, output = Path(run), Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists; give another directory")
    settings = with_steps(read_settings(run), steps, run)
    loaded = load_run_student(run, settings, checkpoint=checkpoint, weights=weights)
    network, teacher = loaded.student.denoiser.network, loaded.teacher
    if not isinstance(network, ControlledSana):
        raise ValueError(f"{run} trained a student without a ControlNet: use scripts/export_pipeline.py")
    pipeline: Any = teacher.pipeline
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, stochastic_sampling=True)
    pipeline.register_modules(transformer=network.transformer, controlnet=network.controlnet, scheduler=scheduler)
    pipeline.save_pretrained(output, safe_serialization=True)
    _, rows, columns = teacher.latent_shape(settings.height, settings.width)
    factor = pipeline.vae_scale_factor
    call = ControlCall(
        sigmas=loaded.student.times,
        height=rows * factor,
        width=columns * factor,
        training_guidance=settings.guidance,
        training_step=loaded.step,
        sampler_difference=0.0,
    )
    difference = sampler_difference(output, call, teacher, loaded.student)
    if not difference <= TOLERANCE:
        shutil.rmtree(output)
        raise ExportMismatchError(
            f"the exported pipeline and the training sampler differ by {difference:.3e} of the largest latent "
            f"(allowed {TOLERANCE:.0e}) from the same latents, prompts, pictures and noise"
        )
    record = {**asdict(call), "sampler_difference": difference}
    (output / CALL_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return read_call(output)


def read_call(folder: str | Path) -> ControlCall:
    """The call of an exported folder. Raises ValueError when it has none."""
    file = Path(folder) / CALL_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a folder of scripts/export_sana_control.py")
    record = json.loads(file.read_text(encoding="utf-8"))
    return ControlCall(**{**record, "sigmas": tuple(record["sigmas"])})


@torch.no_grad()
def sampler_difference(folder: Path, call: ControlCall, teacher: Teacher, student: Student) -> float:
    """Largest difference of the latents of the stock pipeline at `folder` and of our sampler, over the largest latent.

    Both draw two samples from the same latents, random control pictures and noise.
    """
    generator = torch.Generator().manual_seed(SEED)
    count = len(CHECKED_PROMPTS)
    pixels = torch.rand((count, 3, call.height, call.width), generator=generator)
    latents = torch.randn((count, *teacher.latent_shape(call.height, call.width)), generator=generator)
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        list(CHECKED_PROMPTS),
        control_image=2 * pixels - 1,
        latents=latents.clone(),
        generator=torch.Generator().manual_seed(SEED + 1),
        output_type="latent",
        **call.arguments(),
    ).images
    fresh = torch.Generator().manual_seed(SEED + 1)
    renoise = [torch.randn(latents.shape, generator=fresh) for _ in call.sigmas[1:]]
    condition = teacher.encode(list(CHECKED_PROMPTS)).with_control(teacher.encode_pixels(pixels))
    own = student.sample(latents, condition, renoise)
    return ((stock - own).abs().max() / own.abs().max()).item()


@torch.no_grad()
def draw_control_grid(
    run: str | Path, control: Tensor, prompts: Sequence[str], path: str | Path, *, steps: Sequence[int]
) -> Path:
    """A picture with rows of what is followed, of the teacher at 20 steps, and of a run's student at some steps.

    Args:
        run: run directory of a student with a ControlNet.
        control: [N, C, h, w] latents of the pictures to follow.
        prompts: N prompts.
        path: the PNG file to write.
        steps: a row of the student each.
    """
    settings = read_settings(run)
    teacher = Teacher.load(settings.teacher)
    condition = teacher.encode(list(prompts)).with_control(control)
    noise = sample_noise(SEED, range(len(control)), tuple(control.shape[1:]), stream="latents")
    rows = [teacher.decode(control)]
    labels = ["edges, as decoded", "teacher, 20 steps"]
    rows.append(teacher.decode(teacher.sample(noise, condition, steps=20, guidance=settings.guidance)))
    for count in steps:
        student = load_run_student(Path(run), with_steps(settings, count, Path(run))).student
        renoise = [
            sample_noise(SEED, range(len(control)), tuple(control.shape[1:]), stream=f"renoise_{step}")
            for step in range(count - 1)
        ]
        rows.append(teacher.decode(student.sample(noise, condition, renoise)))
        labels.append(f"student, {count}")
    return save_grid(rows, path, labels=labels)
