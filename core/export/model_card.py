"""What an export says about itself: `distillation.json` for programs and README.md for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal

import yaml

RECORD_FILE = "distillation.json"
CARD_FILE = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Figure:
    """A measured number: `name` with its unit or direction, `value`, and the `setting` it was measured in."""

    name: str
    value: float
    setting: str = ""


@dataclass(frozen=True)
class StudentReport:
    """What training knows about a student and an export cannot see in its weights.

    guidance: the scale w of the teacher in u + w (c - u) during training, 1 is none.
    base_model: the teacher as the user named it: a hub id or a path, see `public_name`.
    height, width: pixels the student was trained at, None for the pipeline's own.
    frames: pixel frames of the videos it was trained at, None for the pipeline's own, and for pictures.
    name: title of the model card, by default the name of the directory.
    """

    method: str
    base_model: str
    guidance: float
    step: int
    ema: bool
    figures: tuple[Figure, ...] = ()
    height: int | None = None
    width: int | None = None
    name: str | None = None
    frames: int | None = None
    base_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    teacher_model: str | None = None


@dataclass(frozen=True)
class Verification:
    """Result of loading an export again: differences are max|a - b| / max|b| of latents in fp32 arithmetic.

    sampler_difference: the pipeline against the training sampler with the stored weights.
    rounding_difference: the training sampler with the stored weights against the one with the trained weights.
    """

    sampler_difference: float
    sampler_tolerance: float
    rounding_difference: float
    rounding_tolerance: float


@dataclass(frozen=True)
class ExportRecord:
    """The content of `distillation.json`.

    times: canonical times of the steps (rectified flow, 1 is noise).
    network_timesteps: what the network is called with at these times.
    num_inference_steps, guidance_scale, sigmas, timesteps, height, width: arguments of the pipeline's __call__, None
        where it needs none.
    max_timesteps, intermediate_timesteps: angles, arguments of SanaSprintPipeline.
    use_resolution_binning: argument of SANA's pipelines; like the two above, None for others.
    num_frames, max_sequence_length: arguments of pipelines of videos, None for others.
    teacher_model: the model that was distilled, where it is another than the one the student is of (`base_model`).
    base_dtype: in which the frozen weights were kept that adapters were trained on, and are to be loaded for adapters.
    absent_components: parts of the pipeline that the teacher does without; a merged export holds stand-ins for them.
    step_noise: where the noise between steps comes from: "none", the "generator" of the call, or torch's "global" one.
    """

    name: str
    method: str
    base_model: str
    steps: int
    sampler: Literal["sde", "ode", "flow_map"]
    times: tuple[float, ...]
    network_timesteps: tuple[float, ...]
    training_guidance: float
    num_inference_steps: int
    guidance_scale: float
    sigmas: tuple[float, ...] | None
    timesteps: tuple[int, ...] | None
    height: int | None
    width: int | None
    step_noise: Literal["none", "generator", "global"]
    pipeline: str
    scheduler: str
    weights: Literal["merged", "lora"]
    dtype: Literal["float32", "float16", "bfloat16"]
    absent_components: tuple[str, ...]
    training_step: int
    ema: bool
    figures: tuple[Figure, ...]
    verification: Verification | None
    versions: tuple[tuple[str, str], ...]
    max_timesteps: float | None = None
    intermediate_timesteps: float | None = None
    use_resolution_binning: bool | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    base_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    teacher_model: str | None = None

    @property
    def any_steps(self) -> bool:
        """Whether the files serve every number of steps, not `steps` alone."""
        return self.scheduler == "FlowMapEulerDiscreteScheduler" and self.sigmas is None

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments that every call of the exported pipeline needs."""
        arguments: dict[str, Any] = {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }
        optional = {
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "height": self.height,
            "width": self.width,
            "use_resolution_binning": self.use_resolution_binning,
            "num_frames": self.num_frames,
            "max_sequence_length": self.max_sequence_length,
        }
        if self.max_timesteps is not None:
            # The pipeline has defaults of its own, which fit two steps: None has to be passed for others.
            arguments["max_timesteps"] = self.max_timesteps
            arguments["intermediate_timesteps"] = self.intermediate_timesteps
        return arguments | {name: value for name, value in optional.items() if value is not None}


def write_record(record: ExportRecord, directory: Path) -> None:
    """Write `distillation.json`; the versions become an object, arguments the caller passes stand under "call"."""
    content = asdict(record) | {"versions": dict(record.versions), "call": record.call_arguments()}
    (directory / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_record(directory: str | Path) -> ExportRecord:
    """Read the `distillation.json` of an export. Raises FileNotFoundError if the directory has none."""
    content = json.loads((Path(directory) / RECORD_FILE).read_text(encoding="utf-8"))
    del content["call"]
    for name in ("times", "network_timesteps", "sigmas", "timesteps", "absent_components"):
        content[name] = None if content[name] is None else tuple(content[name])
    content["figures"] = tuple(Figure(**figure) for figure in content["figures"])
    content["versions"] = tuple(content["versions"].items())
    if content["verification"] is not None:
        content["verification"] = Verification(**content["verification"])
    return ExportRecord(**content)


def public_name(model: str) -> str:
    """`model` as it may be published: a hub id or relative path as given, of other paths the last component alone."""
    windows = PureWindowsPath(model)
    path = windows if windows.drive else PurePath(model)
    if path.is_absolute() or windows.drive or path.parts[:1] in (("~",), ("..",)):
        return path.name
    return model


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
    front: dict[str, Any] = {
        "library_name": "diffusers",
        "base_model": record.base_model,
        "tags": ["diffusers", f"text-to-{_kind(record)}", "few-step", "distillation", record.method],
    }
    if record.weights == "lora":
        front["tags"].append("lora")
    front.update(license_fields)
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {record.name}\n",
        _summary(record),
        f"## Use\n\n```python\n{loading_snippet(record, record.name)}```\n\n{_arguments_remark(record)}",
        f"## Seeds\n\n{_seed_remark(record)}",
        f"## Sampler\n\n{_grid_table(record)}",
        f"## Figures\n\n{_figure_table(record)}",
        f"## Check of the files\n\n{_verification_text(record)}",
    ]
    return "\n".join(sections)


def loading_snippet(record: ExportRecord, directory: str) -> str:
    """Python that loads the export from `directory` with diffusers alone and makes one image or video."""
    arguments = ", ".join(f"{name}={value}" for name, value in record.call_arguments().items())
    # Adapters go on the weights that they were trained on, whatever they are stored in themselves.
    held = record.base_dtype if record.weights == "lora" else record.dtype
    dtype = "" if held == "float32" else f", dtype=torch.{held}"
    lines = ["import torch"] if dtype or record.step_noise == "global" else []
    if record.weights == "lora":
        absent = "".join(f", {name}=None" for name in record.absent_components)
        lines += [
            f"from diffusers import DiffusionPipeline, {record.scheduler}",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{record.base_model}"{dtype}{absent})',
            f'pipeline.load_lora_weights("{directory}")',
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
    lines.append(made.format(f'pipeline("a prompt", {arguments})'))
    return "\n".join(lines) + "\n"


def _kind(record: ExportRecord) -> str:
    """What the pipeline makes."""
    return "image" if record.num_frames is None else "video"


def _summary(record: ExportRecord) -> str:
    calls = "one network call" if record.steps == 1 else f"{record.steps} network calls"
    kind = "LoRA weights" if record.weights == "lora" else "pipeline"
    article = "an image" if _kind(record) == "image" else "a video"
    averaged = "moving average of the weights" if record.ema else "live weights"
    teacher = "a teacher" if record.teacher_model is None else f"the teacher {record.teacher_model} with a"
    return (
        f"A diffusers {kind} that makes {article} in {calls}: {record.base_model}, distilled with {record.method} "
        f"against {teacher} guidance of {record.training_guidance:g} (step {record.training_step}, {averaged}).\n"
    )


def _arguments_remark(record: ExportRecord) -> str:
    if record.max_timesteps is not None:
        return (
            "SanaSprintPipeline stores neither the number of steps nor its angles, so pass all of the above. The "
            f"network is told the guidance: {record.guidance_scale:g} is the scale of the check below, others that the "
            "training covered work as well. It costs no second network call.\n"
        )
    text = (
        "A diffusers pipeline stores neither the number of steps nor the guidance, so pass both: "
        f"`num_inference_steps={record.num_inference_steps}` and `guidance_scale={record.guidance_scale}` (the "
        "guidance of the teacher is already in the weights; more of it doubles the cost and harms the "
        f"{_kind(record)}).\n"
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
    return "No noise enters after the first, so the `generator` (or `latents`) of the call decides the result.\n"


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
