"""Which pipelines are judged, and with which steps and guidance each is called."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fewstep.core.export.contract import own_size, stored_call
from fewstep.core.export.record import RECORD_FILE
from fewstep.core.media.pictures import find_pictures
from fewstep.evaluation.samples.identity import adapted_model, stored_dtype

MIN_SAMPLES = 20
# What an export whose call names no guidance is called at: u + 1 (c - u).
GUIDANCE_OFF = 1.0
# Arguments of a call that a `StepGrid` has by name.
STEPS_AND_SIZE = (
    "num_inference_steps",
    "sigmas",
    "timesteps",
    "height",
    "width",
    "num_frames",
    "max_timesteps",
    "intermediate_timesteps",
)
# Of real pictures on a page where nothing is drawn.
SHOWN_SIDE = 256
SPLITS = ("test", "train")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class StepGrid:
    """What a pipeline has to be called with: `sigmas` or `timesteps` of its steps, SanaSprintPipeline's angles, and the
    size of its pictures in pixels, and of its videos in frames, where that is not its own; nothing is the usual case.

    `own_call` is the rest of what an export says its call needs, the guidance with it, where that is not chosen anew.
    """

    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    height: int | None = None
    width: int | None = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | None = None
    frames: int | None = None
    own_call: Mapping[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the pipeline's call."""
        grids = {"sigmas": self.sigmas, "timesteps": self.timesteps}
        size = {"height": self.height, "width": self.width}
        arguments: dict[str, Any] = {name: list(values) for name, values in grids.items() if values is not None}
        arguments |= {name: value for name, value in size.items() if value is not None}
        if self.max_timesteps is not None:
            # None is an argument here: the pipeline's default fits two steps alone.
            arguments |= {"max_timesteps": self.max_timesteps, "intermediate_timesteps": self.intermediate_timesteps}
        return arguments


OWN_GRID = StepGrid()


@dataclass(frozen=True)
class System:
    """A pipeline directory, how to call it, and its name in a report.

    `dtype` is the one its weights are stored in, in which it is judged. `training_guidance` is the guidance that a
    student was distilled at, None where there is no record. `call` says in words what else it is called with. With
    `pictures` the folder holds finished pictures, and nothing is drawn.
    """

    name: str
    path: str
    steps: int
    guidance: float
    grid: StepGrid = OWN_GRID
    dtype: str = "float32"
    training_guidance: float | None = None
    call: str = ""
    pictures: bool = False


def read_system(
    path: str | Path, *, name: str | None = None, steps: int | None = None, guidance: float | None = None
) -> System:
    """A system at `path`; steps and guidance that are not given come from the export's distillation.json.

    Raises ValueError when there is no such pipeline, or when a number is neither given nor in the record.
    """
    folder = Path(path)
    require_pipeline(folder)
    record_file = folder / RECORD_FILE
    # An export that a stock pipeline has saved again keeps its call alone.
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else stored_call(folder) or {}
    if record.get("told_picture"):
        raise ValueError(
            f"{folder} is told a picture with each prompt, which the evaluation does not give: judge finished pictures "
            "or videos (--pictures)"
        )
    # The record keeps the call apart.
    call = record.get("call", {"guidance_scale": 1.0}) if record_file.is_file() else record
    own_steps = record.get("num_inference_steps")
    chosen_steps = own_steps if steps is None else steps
    chosen_guidance = guidance
    if guidance is None and record:
        chosen_guidance = record.get("guidance_scale", GUIDANCE_OFF)
    if chosen_steps is None or chosen_guidance is None:
        missing = "steps" if chosen_steps is None else "guidance"
        raise ValueError(f"{folder} has no {RECORD_FILE} that tells its {missing}; give --{missing}")
    if chosen_steps < 1 or not math.isfinite(chosen_guidance):
        raise ValueError(f"steps is {chosen_steps} and guidance {chosen_guidance}; use at least 1, and a finite number")
    # Times belong to the step count they were written for.
    fits = chosen_steps == own_steps
    sigmas, timesteps = (record.get(key) if fits else None for key in ("sigmas", "timesteps"))
    grid = StepGrid(
        None if sigmas is None else tuple(sigmas),
        None if timesteps is None else tuple(timesteps),
        height=record.get("height"),
        width=record.get("width"),
        max_timesteps=record.get("max_timesteps"),
        intermediate_timesteps=record.get("intermediate_timesteps") if fits else None,
        frames=record.get("num_frames"),
        own_call=own_call(call) if guidance is None and record else None,
    )
    return System(
        name or folder.name,
        str(folder),
        int(chosen_steps),
        float(chosen_guidance),
        grid,
        # Adapters go on the weights that they were trained on, whatever they are stored in.
        dtype=record.get("base_dtype" if record.get("weights") == "lora" else "dtype") or stored_dtype(folder),
        training_guidance=record.get("training_guidance"),
    )


def own_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of an export's call beside its steps and size."""
    return {name: value for name, value in call.items() if name not in STEPS_AND_SIZE}


def base_of(path: str | Path) -> Path:
    """The folder of a pipeline: the path itself, or for a folder of adapters the model that they are for.

    Raises ValueError when that model is neither a folder nor a hub id.
    """
    base = adapted_model(path)
    if base is None:
        return Path(path)
    folder = Path(find_pipeline(base))
    if not folder.is_dir():
        raise ValueError(
            f"{path} holds adapters for {base}, and there is no such folder here: export them merged, or with "
            "--base_model OWNER/NAME"
        )
    return folder


def require_pipeline(path: str | Path) -> None:
    """Raises ValueError unless `path` is a directory with a diffusers pipeline, or with adapters of one."""
    folder = base_of(path)
    if not folder.is_dir():
        raise ValueError(f"there is no directory {folder}; give a diffusers pipeline directory")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no diffusers pipeline: it has no model_index.json")


def require_samples(samples: int) -> None:
    """Raises ValueError for too few samples to say anything of a system."""
    if samples < MIN_SAMPLES:
        raise ValueError(f"samples is {samples}; use at least {MIN_SAMPLES}: of fewer no figure says anything")


@dataclass(frozen=True)
class OwnReference:
    """The user's file of prompts, None where nothing is drawn or read by them, and a folder of pictures or an .npz file
    of their statistics, or None.

    Pictures are read at their own size, or covered and cut to that of the samples with `cut`.
    """

    prompts: str | None
    images: str | None
    height: int
    width: int
    cut: bool = False

    def is_statistics(self) -> bool:
        """Whether the reference is a file of statistics."""
        return self.images is not None and Path(self.images).suffix == ".npz"


def parse_split(reference: str | None) -> str | None:
    """The split of "digits" or "digits:train", None for anything else. Raises ValueError for another split."""
    name, _, split = (reference or "").partition(":")
    # A folder of that name is the user's.
    if name != "digits" or Path(str(reference)).exists():
        return None
    if split not in ("", *SPLITS):
        raise ValueError(
            f"reference is {reference!r}; the digits have {' and '.join(f'digits:{one}' for one in SPLITS)}"
        )
    return split or "test"


def pick_reference(
    reference: str | None, systems: Sequence[System], *, prompts: str | None, cut: bool = False
) -> str | OwnReference:
    """A split of the digits, or the user's prompts with pictures, statistics or nothing to compare with.

    Raises ValueError for missing prompts, for prompts beside the digits, when there is no such place, and when systems
    draw different sizes.
    """
    split = parse_split(reference)
    if split is not None:
        if prompts is not None:
            raise ValueError(f"--prompts beside --reference {reference}, which brings its own prompts; leave one out")
        return split
    if prompts is None and not all(system.pictures for system in systems):
        raise ValueError("give --prompts FILE, a prompt a line, or --reference digits for the embedded digits")
    if reference is not None and not Path(reference).exists():
        raise ValueError(f"there is no {reference}; --reference is a folder of pictures, an .npz file, or 'digits'")
    sizes = {picture_size(system) for system in systems if not system.pictures}
    if cut and len(sizes) != 1:
        raise ValueError(
            f"--reference_fit cut takes the size of the samples, and the pipelines draw {sorted(sizes) or 'nothing'}"
        )
    height, width = max(sizes) if sizes else (SHOWN_SIDE, SHOWN_SIDE)
    return OwnReference(prompts, reference, height, width, cut)


def picture_size(system: System) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that a system draws, from its record and its configuration files.

    Raises ValueError when they do not tell.
    """
    folder = base_of(system.path)
    height, width = own_size(folder)
    own = system.grid
    return own.height or height, own.width or width


def parse_systems(
    pipelines: Sequence[str],
    *,
    steps: Sequence[int] | None = None,
    guidance: Sequence[float] | None = None,
    grids: Sequence[str] | None = None,
) -> list[System]:
    """Systems from "DIR", "NAME=DIR", or hub ids in place of DIR, which are downloaded.

    Steps, guidance and grids are one for all, one each, or None (distillation.json); a grid is "own", or sigmas of all
    steps such as "1,0.5". Raises ValueError for bad directories and for numbers that fit neither way.
    """
    count = len(pipelines)
    own_steps: Sequence[int | None] = [None] * count if steps is None else _one_each(steps, count, option="steps")
    own_guidance: Sequence[float | None] = (
        [None] * count if guidance is None else _one_each(guidance, count, option="guidance")
    )
    own_grids = ["own"] * count if grids is None else _one_each(grids, count, option="grid")
    systems = []
    for text, number, scale, grid in zip(pipelines, own_steps, own_guidance, own_grids, strict=True):
        label, place = named_place(text)
        system = read_system(find_pipeline(place), name=label or Path(place).name, steps=number, guidance=scale)
        systems.append(system if grid == "own" else with_sigmas(system, grid))
    return systems


def parse_pictures(folders: Sequence[str]) -> list[System]:
    """Folders of finished pictures from "DIR" or "NAME=DIR". Raises ValueError when there is no such folder."""
    systems = []
    for text in folders:
        label, place = named_place(text)
        if not Path(place).is_dir():
            raise ValueError(f"there is no directory {place}; give a folder of pictures")
        # Empty folders and unreadable kinds are seen before anything is drawn.
        require_samples(len(find_pictures(place)))
        systems.append(System(label or Path(place).absolute().name, place, 0, 1.0, pictures=True))
    return systems


def require_names(systems: Sequence[System]) -> None:
    """Systems of one name, steps, guidance and call are training runs of one recipe, and so are other pipelines.

    Raises ValueError for one that comes twice, for folders of pictures of one name, and for different pipelines whose
    folders merely have the same name.
    """
    seen: dict[tuple[str, int, float, str], list[System]] = {}
    for system in systems:
        seen.setdefault((system.name, system.steps, system.guidance, system.call), []).append(system)
    for (name, *_), same in seen.items():
        paths = {str(Path(one.path).resolve()) for one in same}
        if len(paths) < len(same):
            raise ValueError(f"{name} is given twice with the same call; give it once")
        if len(same) > 1 and (same[0].pictures or any(name == Path(one.path).name for one in same)):
            raise ValueError(
                f"{len(same)} systems are called {name}; write NAME=DIR, with one name for runs of one recipe alone"
            )


def named_place(text: str) -> tuple[str | None, str]:
    """(name or None, place). A folder may have an equals sign in its own name."""
    name, separator, path = ("", "", "") if Path(text).is_dir() else text.partition("=")
    return (name, path) if separator else (None, text)


def find_pipeline(place: str) -> str:
    """A folder as it is, or the one into which a model of the hub was downloaded. Raises ValueError for neither."""
    if Path(place).exists() or not HUB_ID.fullmatch(place):
        return place
    # The hub's client takes a second to import, and most evaluations do without it.
    from fewstep.core.teacher_files import download_pipeline

    return str(download_pipeline(place))


def with_sigmas(system: System, text: str) -> System:
    """The system called on a grid of its own. Raises ValueError unless sigmas fall and are one per step."""
    try:
        sigmas = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--grid is {text!r}; write sigmas such as 1,0.5, or own") from error
    falling = all(high > low for high, low in itertools.pairwise(sigmas))
    if len(sigmas) != system.steps or not falling or not sigmas[-1] > 0.0 or sigmas[0] > 1.0:
        raise ValueError(
            f"--grid {text} has {len(sigmas)} sigmas for {system.steps} steps of {system.name}; give one a step, "
            "falling within (0, 1]"
        )
    return replace(system, grid=replace(system.grid, sigmas=sigmas), call=f"sigmas {text}")


Number = TypeVar("Number", int, float, str)


def _one_each(values: Sequence[Number], count: int, *, option: str) -> list[Number]:
    if len(values) not in (1, count):
        raise ValueError(f"--{option} has {len(values)} values for {count} pipelines; give one for all or one each")
    return [values[0]] * count if len(values) == 1 else list(values)
