"""What an export says about itself to people: README.md, a model card as the hub reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fewstep.core.export.contract import CALL_KEY
from fewstep.core.export.record import PICTURE_FILE, ExportRecord, Figure, read_record, write_record

CARD_FILE = "README.md"
# Those that AutoPipelineForImage2Image knows and whose steps are ours.
PICTURE_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
LICENSE_KEYS = ("license", "license_name", "license_link")


def license_of(model_directory: str | Path) -> dict[str, str]:
    """The license keys in the front matter of a model's README.md, empty where there is none to read."""
    card = Path(model_directory) / CARD_FILE
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    front = yaml.safe_load(parts[1])
    if not isinstance(front, dict):
        return {}
    return {key: str(front[key]) for key in LICENSE_KEYS if key in front}


def write_model_card(record: ExportRecord, directory: Path, *, license_fields: dict[str, str]) -> None:
    """Write README.md into `directory`."""
    (directory / CARD_FILE).write_text(model_card(record, license_fields=license_fields), encoding="utf-8")


def add_figures(directory: str | Path, figures: Sequence[Figure]) -> ExportRecord:
    """Put figures that were measured on an export into its record and its model card, beside those that are there.

    A figure of the same name and setting is replaced. Raises FileNotFoundError if the directory is no export.
    """
    directory = Path(directory)
    record = read_record(directory)
    named = {(figure.name, figure.setting): figure for figure in (*record.figures, *figures)}
    record = replace(record, figures=tuple(named.values()))
    write_record(record, directory)
    write_model_card(record, directory, license_fields=license_of(directory))
    return record


def model_card(record: ExportRecord, *, license_fields: dict[str, str]) -> str:
    """Markdown with YAML front matter as the Hugging Face hub reads it.

    The loading snippet has the name of the record in the place of the directory.
    """
    kind = "adapter" if record.weights == "lora" else "finetune"
    task = f"{'image' if record.told_picture else 'text'}-to-{_kind(record)}"
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    # The hub takes ids alone, and a folder's name would be somebody's.
    if record.base_model_id is not None:
        front |= {"base_model": record.base_model_id, "base_model_relation": kind}
    front["tags"] = ["diffusers", task, "few-step", "distillation", record.method]
    if record.weights == "lora":
        front["tags"].append("lora")
    if record.picture_step is not None:
        front["thumbnail"] = PICTURE_FILE
    front.update(license_fields)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {record.name}\n",
        _call_line(record),
        _summary(record),
        *_picture(record),
        f"## Use\n\n```python\n{loading_snippet(record, record.name)}```\n\n{_arguments_remark(record)}",
        *_picture_to_picture(record),
        f"## Seeds\n\n{_seed_remark(record)}",
        f"## Sampler\n\n{_grid_table(record)}",
        f"## Figures\n\n{_figure_table(record)}",
        f"## Check of the files\n\n{_verification_text(record)}",
    ]
    return "\n".join(sections)


def _call_line(record: ExportRecord) -> str:
    """The first line: what a call without arguments would get wrong."""
    arguments = ", ".join(f"{name}={value}" for name, value in record.call_arguments().items())
    return (
        f"**Call it with `{arguments}`.** The class {record.pipeline} has defaults of its own for these, with which "
        "this student was not trained.\n"
    )


def _picture(record: ExportRecord) -> list[str]:
    if record.picture_step is None:
        return []
    when = "" if record.picture_step == record.training_step else f", at step {record.picture_step} of the training"
    return [f"![Samples of teacher and student]({PICTURE_FILE})\n\nSamples with the same prompts and seeds{when}.\n"]


def _picture_to_picture(record: ExportRecord) -> list[str]:
    """From which strengths on a picture is begun with, as the stock pipelines count them."""
    if record.pipeline not in PICTURE_PIPELINES or record.weights == "lora":
        return []
    head = "## From a picture\n\n"
    if record.steps == 1:
        return [
            f"{head}One step begins with noise alone: `AutoPipelineForImage2Image` refuses the call, or leaves the "
            "picture out. Export more steps for that.\n"
        ]
    # SD3 rounds the steps that are left up, the others down; halfway between two it is the same for all.
    is_sd3 = record.pipeline == "StableDiffusion3Pipeline"
    offset = -0.5 if is_sd3 else 0.5
    bound = f"above {(record.steps - 1) / record.steps:.3g}" if is_sd3 else "1"
    kept_steps = range(1, record.steps)
    rows = [f"| {(kept + offset) / record.steps:.3g} | {kept} | {record.times[-kept]:.4g} |" for kept in kept_steps]
    return [
        f"{head}`AutoPipelineForImage2Image.from_pipe(pipeline)` noises a picture to the time of a step and makes "
        "those from there on, at the times of the training; call it with all of the above. `strength` "
        f"{bound} begins with noise alone and leaves the picture out.\n\n"
        "| strength | steps | from time |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    ]


def loading_snippet(record: ExportRecord, directory: str) -> str:
    """Python that loads the export from `directory` with diffusers alone and makes one image or video."""
    arguments = ", ".join(f"{name}={value}" for name, value in record.call_arguments().items())
    # Adapters go on the weights that they were trained on, whatever they are stored in themselves.
    held = record.base_dtype if record.weights == "lora" else record.dtype
    dtype = "" if held == "float32" else f", dtype=torch.{held}"
    lines = ["import torch"] if dtype or record.step_noise == "global" else []
    if record.weights == "lora":
        absent = "".join(f", {name}=None" for name in record.absent_components)
        # The files of one model may serve a pipeline with a picture and one without.
        kind = record.pipeline if record.told_picture else "DiffusionPipeline"
        second = [
            f'pipeline.load_lora_weights("{directory}", weight_name="{name}", load_into_transformer_2=True)'
            for name in record.lora_files[1:]
        ]
        first = f', weight_name="{record.lora_files[0]}"' if second else ""
        lines += [
            f"from diffusers import {kind}, {record.scheduler}",
            "",
            f'pipeline = {kind}.from_pretrained("{record.base_model}"{dtype}{absent})',
            f'pipeline.load_lora_weights("{directory}"{first})',
            *second,
            f'pipeline.scheduler = {record.scheduler}.from_pretrained("{directory}", subfolder="scheduler")',
        ]
    else:
        lines += [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{directory}"{dtype})',
        ]
    if record.step_noise == "global":
        lines.append("torch.manual_seed(0)")
    made = "frames = {}.frames[0]" if _kind(record) == "video" else "image = {}.images[0]"
    if record.told_picture:
        # Covered and cut, as pictures are in training.
        size = f"({record.width}, {record.height})"
        lines += [f'picture = ImageOps.fit(load_image("picture.png"), {size}, Image.Resampling.LANCZOS)']
        lines.insert(0, "from diffusers.utils import load_image")
        lines.insert(1, "from PIL import Image, ImageOps")
    lines.append(made.format(f"pipeline({record.example_call}, {arguments})"))
    return "\n".join(lines) + "\n"


def _kind(record: ExportRecord) -> str:
    """What the pipeline makes."""
    return "image" if record.num_frames is None else "video"


def _summary(record: ExportRecord) -> str:
    calls = "one network call" if record.steps == 1 else f"{record.steps} network calls"
    kind = "LoRA weights for diffusers that make" if record.weights == "lora" else "A diffusers pipeline that makes"
    article = "an image" if _kind(record) == "image" else "a video"
    averaged = "moving average of the weights" if record.ema else "live weights"
    teacher = "a teacher" if record.teacher_model is None else f"the teacher {record.teacher_model} with a"
    return (
        f"{kind} {article} in {calls}: {record.base_model}, distilled with {record.method} "
        f"against {teacher} guidance of {record.training_guidance:g} (step {record.training_step}, {averaged}).\n"
    )


def _arguments_remark(record: ExportRecord) -> str:
    if record.max_timesteps is not None:
        return (
            "SanaSprintPipeline stores neither the number of steps nor its angles, so pass all of the above. The "
            f"network is told the guidance: {record.guidance_scale:g} is the scale of the check below, others that the "
            "training covered work as well. It costs no second network call.\n"
        )
    told = (
        "this network switches more of it off, whatever is passed"
        if record.guidance_off
        else f"more of it doubles the cost and harms the {_kind(record)}"
    )
    names = ", ".join(f"{name}={value}" for name, value in record.guidance_call.items())
    if record.guidance_scale != 1:
        told = f"the network is told {record.guidance_scale:g}, at which it was trained, and it costs no second call"
    text = (
        "A diffusers pipeline stores neither the number of steps nor the guidance, so pass both: "
        f"`num_inference_steps={record.num_inference_steps}` and `{names}` (the "
        f"guidance of the teacher is already in the weights; {told}). They also stand in "
        f"`pipeline.scheduler.config.{CALL_KEY}`, which `save_pretrained` keeps.\n"
    )
    if record.any_steps:
        text += "\nAny other number of steps works with the same files: 1 is the fastest, more are shorter jumps.\n"
    if record.absent_components and record.weights == "merged":
        text += (
            f"\nThe teacher does without {', '.join(record.absent_components)}. The parts of that name are stand-ins "
            "of zero weights with the same effect, because diffusers loads no pipeline of this kind without them.\n"
        )
    extra = record.sigmas or record.timesteps
    if extra is not None:
        name = "sigmas" if record.sigmas is not None else "timesteps"
        text += f"\n`{name}={list(extra)}` is needed as well: no scheduler setting places its steps on this grid.\n"
    return text


def _seed_remark(record: ExportRecord) -> str:
    if record.step_noise == "global":
        return (
            f"{record.pipeline} does not hand its `generator` to the scheduler. The `generator` of the call decides "
            "the first noise only; the noise between the steps comes from torch's global generator. For a result that "
            "can be made again, call `torch.manual_seed(seed)` directly before every call of the pipeline.\n"
        )
    if record.step_noise == "generator":
        return (
            "The `generator` of the call decides the first noise and the noise between the steps; the same seed gives "
            "the same result. Latents alone (`latents=`) do not fix it.\n"
        )
    text = "No noise enters after the first, so the `generator` (or `latents`) of the call decides the result.\n"
    if record.training_sampler is not None:
        text += (
            "\nThe training re-noised between the steps; these files follow the velocity instead, so that a seed "
            "decides all. Compare both before you publish one.\n"
        )
    return text


def _grid_table(record: ExportRecord) -> str:
    updates = {
        "sde": "re-noise the predicted x0 (sde)",
        "ode": "Euler step (ode)",
        "flow_map": "jump of the flow map, an Euler step of weights that are made for these times alone (flow_map)",
    }
    update = updates[record.sampler]
    if record.any_steps:
        update = "jump of the flow map, whose network is told both times (flow_map)"
    rows = [f"{record.scheduler}; between steps: {update}.\n", "| step | time t | network timestep |", "|---|---|---|"]
    pairs = zip(record.times, record.network_timesteps, strict=True)
    rows += [f"| {i} | {time:.6g} | {timestep:.6g} |" for i, (time, timestep) in enumerate(pairs, start=1)]
    return "\n".join(rows) + "\n"


def _figure_table(record: ExportRecord) -> str:
    if not record.figures:
        return "None were measured for this export.\n"
    rows = ["| figure | value | setting |", "|---|---|---|"]
    rows += [f"| {figure.name} | {figure.value:.5g} | {figure.setting} |" for figure in record.figures]
    return "\n".join(rows) + "\n"


def _verification_text(record: ExportRecord) -> str:
    versions = ", ".join(f"{library} {version}" for library, version in record.versions)
    if record.verification is None:
        return f"Not compared with the training sampler. Written with {versions}.\n"
    check = record.verification
    return (
        "After writing, the files were loaded again and compared with the sampler of the training, from the same "
        f"latents: largest difference {check.sampler_difference:.1e} of the largest value (allowed "
        f"{check.sampler_tolerance:.0e}). Storing the weights as {record.dtype} moves the latents by "
        f"{check.rounding_difference:.1e} (allowed {check.rounding_tolerance:.0e}). Written with {versions}.\n"
    )
