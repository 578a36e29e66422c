"""Which pipelines are judged, and with which steps and guidance each is called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

RECORD_FILE = "distillation.json"
MIN_SAMPLES = 20


@dataclass(frozen=True)
class StepGrid:
    """What a pipeline has to be called with: `sigmas` or `timesteps` of its steps, SanaSprintPipeline's angles, and the
    size of its pictures in pixels where that is not its own; nothing is the usual case.
    """

    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    height: int | None = None
    width: int | None = None
    max_timesteps: float | None = None
    intermediate_timesteps: float | None = None

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
    """A pipeline directory, how to call it, and its name in a report."""

    name: str
    path: str
    steps: int
    guidance: float
    grid: StepGrid = OWN_GRID


def read_system(
    path: str | Path, *, name: str | None = None, steps: int | None = None, guidance: float | None = None
) -> System:
    """A system at `path`; steps and guidance that are not given come from the export's distillation.json.

    Raises ValueError when there is no such pipeline, or when a number is neither given nor in the record.
    """
    folder = Path(path)
    require_pipeline(folder)
    record_file = folder / RECORD_FILE
    record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else {}
    own_steps = record.get("num_inference_steps")
    chosen_steps = own_steps if steps is None else steps
    chosen_guidance = record.get("guidance_scale") if guidance is None else guidance
    if chosen_steps is None or chosen_guidance is None:
        missing = "steps" if chosen_steps is None else "guidance"
        raise ValueError(f"{folder} has no {RECORD_FILE} that tells its {missing}; give --{missing}")
    if chosen_steps < 1:
        raise ValueError(f"steps is {chosen_steps}; use at least 1")
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
    )
    return System(name or folder.name, str(folder), int(chosen_steps), float(chosen_guidance), grid)


def require_pipeline(path: str | Path) -> None:
    """Raises ValueError unless `path` is a directory with a diffusers pipeline."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"there is no directory {folder}; give a diffusers pipeline directory")
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is no diffusers pipeline: it has no model_index.json (LoRA exports: merge them first)"
        )


def require_samples(samples: int) -> None:
    """Raises ValueError for too few samples to hold every digit twice."""
    if samples < MIN_SAMPLES:
        raise ValueError(f"samples is {samples}; use at least {MIN_SAMPLES} (two of each embedded digit)")


@dataclass(frozen=True)
class OwnReference:
    """The user's file of prompts and folder of pictures, and the size in pixels at which the pictures are read."""

    prompts: str
    images: str
    height: int
    width: int


def pick_reference(
    split: str, systems: Sequence[System], *, prompts: str | None, images: str | None
) -> str | OwnReference:
    """The digits split where neither prompts nor pictures are given, else these, at the size that all systems draw.

    Raises ValueError when one is given without the other, or when systems draw different sizes.
    """
    if prompts is None and images is None:
        return split
    if prompts is None or images is None:
        given, missing = ("reference_images", "prompts") if prompts is None else ("prompts", "reference_images")
        raise ValueError(f"--{given} without --{missing}; give both to judge your own model, or neither for the digits")
    sizes = {picture_size(system) for system in systems}
    if len(sizes) != 1:
        raise ValueError(f"the pipelines draw pictures of {sorted(sizes)} pixels; judge those of one size at a time")
    height, width = sizes.pop()
    return OwnReference(prompts, images, height, width)


def picture_size(system: System) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that a system draws, from its record and its configuration files.

    Raises ValueError when they do not tell.
    """
    folder = Path(system.path)
    network = "transformer" if (folder / "transformer").is_dir() else "unet"
    try:
        latent = json.loads((folder / network / "config.json").read_text(encoding="utf-8"))["sample_size"]
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        levels = vae["encoder_block_out_channels" if "encoder_block_out_channels" in vae else "block_out_channels"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} does not tell its picture size: {network}/config.json needs sample_size and vae/config.json "
            f"block_out_channels ({error!r})"
        ) from error
    height, width = (latent, latent) if isinstance(latent, int) else latent
    # Every level of the autoencoder but the last halves both sides.
    factor = 2 ** (len(levels) - 1)
    own = system.grid
    return own.height or height * factor, own.width or width * factor


def parse_systems(
    pipelines: Sequence[str], *, steps: Sequence[int] | None = None, guidance: Sequence[float] | None = None
) -> list[System]:
    """Systems from "DIR" or "NAME=DIR"; steps and guidance are one for all, one each, or None (distillation.json).

    Raises ValueError for bad directories and for numbers that fit neither way.
    """
    count = len(pipelines)
    own_steps: Sequence[int | None] = [None] * count if steps is None else _one_each(steps, count, option="steps")
    own_guidance: Sequence[float | None] = (
        [None] * count if guidance is None else _one_each(guidance, count, option="guidance")
    )
    systems = []
    for text, number, scale in zip(pipelines, own_steps, own_guidance, strict=True):
        # A folder may have an equals sign in its own name.
        name, separator, path = ("", "", "") if Path(text).is_dir() else text.partition("=")
        place, label = (path, name) if separator else (text, None)
        systems.append(read_system(place, name=label, steps=number, guidance=scale))
    return systems


Number = TypeVar("Number", int, float)


def _one_each(values: Sequence[Number], count: int, *, option: str) -> list[Number]:
    if len(values) not in (1, count):
        raise ValueError(f"--{option} has {len(values)} values for {count} pipelines; give one for all or one each")
    return [values[0]] * count if len(values) == 1 else list(values)
