"""What an export says of itself to programs: `distillation.json`."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal

RECORD_FILE, PICTURE_FILE = "distillation.json", "samples.png"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# A model of the hub in its client's cache: models--owner--name/snapshots/REVISION.
CACHED_ID = re.compile(r"models--([^/]+?)--([^/]+)")


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
    hub_id: of the base model on the hub; None is what `base_model` says of itself.
    picture: a grid of samples to show, and the training step that it is of.
    training_sampler: with which the student was trained, None where it is that of the files.
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
    hub_id: str | None = None
    picture: tuple[Path, int] | None = None
    training_sampler: Literal["sde", "ode", "flow_map"] | None = None


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
    guidance_scale: what the network is told where it is told a guidance, else 1.
    guidance_arguments: arguments of the call with which it makes no second call of the network, and tells it that.
    other_arguments: further arguments of the call, such as a frame rate.
    example_call: what the call is given first, as Python.
    lora_files: names of the files of adapters, of which a second is for the second of two networks.
    told_picture: whether every call is told a picture beside the text.
    num_inference_steps, sigmas, timesteps, height, width: arguments of the pipeline's __call__, None where it needs
        none.
    max_timesteps, intermediate_timesteps: angles, arguments of SanaSprintPipeline.
    use_resolution_binning: argument of SANA's pipelines; like the two above, None for others.
    num_frames, max_sequence_length: arguments of pipelines of videos, None for others.
    teacher_model: the model that was distilled, where it is another than the one the student is of (`base_model`).
    base_dtype: in which the frozen weights were kept that adapters were trained on, and are to be loaded for adapters.
    absent_components: parts of the pipeline that the teacher does without; a merged export holds stand-ins for them.
    base_model_id: of the base model on the hub, None where it is a folder.
    picture_step: training step that samples.png in the export is of, None without it.
    training_sampler: with which the student was trained, None where it is `sampler`.
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
    base_model_id: str | None = None
    picture_step: int | None = None
    training_sampler: Literal["sde", "ode", "flow_map"] | None = None
    guidance_arguments: dict[str, float] | None = None
    other_arguments: dict[str, Any] = field(default_factory=dict)
    example_call: str = '"a prompt"'
    lora_files: tuple[str, ...] = ()
    told_picture: bool = False

    @property
    def guidance_off(self) -> bool:
        """Whether the network has an embedding by which stock pipelines leave guidance out: merged U-Nets."""
        names = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
        return self.weights == "merged" and self.pipeline in names

    @property
    def any_steps(self) -> bool:
        """Whether the files serve every number of steps, not `steps` alone."""
        return self.scheduler == "FlowMapEulerDiscreteScheduler" and self.sigmas is None

    @property
    def guidance_call(self) -> dict[str, float]:
        """The arguments of guidance; older records have `guidance_scale` alone."""
        own = self.guidance_arguments
        return {"guidance_scale": self.guidance_scale} if own is None else own

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments that every call of the exported pipeline needs."""
        arguments: dict[str, Any] = {"num_inference_steps": self.num_inference_steps, **self.guidance_call}
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
        given = {name: value for name, value in optional.items() if value is not None}
        return arguments | given | self.other_arguments


def write_record(record: ExportRecord, directory: Path) -> None:
    """Write `distillation.json`; the versions become an object, arguments the caller passes stand under "call"."""
    content = asdict(record) | {"versions": dict(record.versions), "call": record.call_arguments()}
    (directory / RECORD_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_record(directory: str | Path) -> ExportRecord:
    """Read the `distillation.json` of an export. Raises FileNotFoundError if the directory has none."""
    content = json.loads((Path(directory) / RECORD_FILE).read_text(encoding="utf-8"))
    del content["call"]
    for name in ("times", "network_timesteps", "sigmas", "timesteps", "absent_components", "lora_files"):
        # Older records have no files of adapters.
        content[name] = None if content.get(name, ()) is None else tuple(content.get(name, ()))
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


def hub_id_of(model: str) -> str | None:
    """The hub id that a model was named by, or whose files in the client's cache it names; None for other places."""
    cached = CACHED_ID.search(PurePath(model).as_posix())
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None
