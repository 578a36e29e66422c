"""Videos of whatever makes them: stock Wan and AnyFlow pipelines, and causal students, one way to draw them all.

Shapes: videos [B, 3, T, H, W] in [0, 1], frames uint8 [H, W, 3].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.causal_video.settings import FILE_NAME, STOCK_RATE, CausalSettings, load_defaults
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.core.randomness import shared_integer
from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.samples.draw import Draw
from fewstep.evaluation.samples.identity import pipeline_fingerprint, stored_dtype
from fewstep.evaluation.samples.store import SamplePlan, prompts_digest
from fewstep.evaluation.systems import System, find_pipeline, read_system


@dataclass(frozen=True)
class VideoCall:
    """How videos are made; None is the pipeline's own, or what its distillation.json says.

    `chunks` is the length of a causal student's streams, which others do not have; they have `frames`.
    """

    pipeline: str
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    chunks: int | None = None
    rate: int | None = None
    device: str = "cpu"
    dtype: str | None = None


@dataclass(frozen=True)
class VideoSource:
    """What is drawn, and what draws it once it is loaded."""

    plan: SamplePlan
    load: Callable[[], Draw]


def video_source(call: VideoCall, *, seed: int, prompts: Sequence[str]) -> VideoSource:
    """The plan of a store and the function that loads the pipeline and draws.

    Raises ValueError for folders that make no videos, and for options that belong to the other kind.
    """
    folder = find_pipeline(call.pipeline)
    if (Path(folder) / FILE_NAME).is_file():
        return _causal_source(call, folder, seed=seed, prompts=prompts)
    if call.chunks is not None:
        raise ValueError(
            f"{folder} is no causal student ({FILE_NAME} is not there); its length is --frames, not --chunks"
        )
    return _stock_source(call, folder, seed=seed, prompts=prompts)


def _plan(call: VideoCall, folder: str, arguments: dict[str, Any], *, seed: int, prompts: Sequence[str]) -> SamplePlan:
    rate = call.rate or arguments.pop("rate", STOCK_RATE)
    dtype = call.dtype or stored_dtype(folder)
    mark, asked = pipeline_fingerprint(folder), prompts_digest(prompts)
    return SamplePlan(Path(folder).name, mark, arguments, dtype, seed, asked, kind="videos", rate=rate)


def _stock_source(call: VideoCall, folder: str, *, seed: int, prompts: Sequence[str]) -> VideoSource:
    system = read_system(folder, steps=call.steps, guidance=call.guidance)
    size = {key: getattr(call, key) or getattr(system.grid, key) for key in ("height", "width", "frames")}
    grid = type(system.grid)(**{**asdict(system.grid), **size})
    known = {name: value for name, value in asdict(grid).items() if value is not None}
    arguments = {"steps": system.steps, "guidance": system.guidance, **known}
    plan = _plan(call, folder, arguments, seed=seed, prompts=prompts)
    chosen = System(system.name, folder, system.steps, system.guidance, grid, dtype=plan.dtype)

    def load() -> Draw:
        pipeline: Any = load_pipeline(folder, device=call.device, dtype=getattr(torch, plan.dtype))

        def draw(texts: Sequence[str], indices: Sequence[int]) -> torch.Tensor:
            how = {"steps": chosen.steps, "guidance": chosen.guidance, "grid": chosen.grid}
            found = generate(pipeline, texts, indices=indices, seed=seed, batch_size=len(texts), **how)
            if found.ndim != 5:
                raise ValueError(f"{folder} makes pictures; evaluate_image is for them")
            return found

        return draw

    return VideoSource(plan, load)


def _causal_source(call: VideoCall, folder: str, *, seed: int, prompts: Sequence[str]) -> VideoSource:
    for name in ("steps", "guidance", "frames"):
        if getattr(call, name) is not None:
            raise ValueError(
                f"--{name} beside a causal student, whose {FILE_NAME} has its steps; its length is --chunks"
            )
    settings, defaults = CausalSettings.load(folder), load_defaults(folder)
    if defaults.actions:
        raise ValueError(f"{folder} is steered by actions, which prompts alone do not bring")
    chunks = call.chunks or len(settings.layout.lengths)
    size = {"height": call.height or defaults.height, "width": call.width or defaults.width}
    arguments = {"chunks": chunks, "times": [list(times) for times in settings.schedule.times], **size}
    arguments |= {"rate": defaults.frames_per_second, "chunk_starts": chunk_starts(settings, chunks)}
    plan = _plan(call, folder, arguments, seed=seed, prompts=prompts)

    def load() -> Draw:
        dtype = getattr(torch, plan.dtype)
        pipeline = CausalVideoPipeline.from_pretrained(folder, device=call.device, dtype=dtype)

        def frames_of(text: str, index: int) -> Iterable[np.ndarray]:
            own = shared_integer(seed, index, "video", 2**31)
            session = pipeline.open(text, seed=own, height=size["height"], width=size["width"])
            for output in session.stream(chunks):
                yield from output.images()

        def draw(texts: Sequence[str], indices: Sequence[int]) -> list[Iterable[np.ndarray]]:
            return [frames_of(text, index) for text, index in zip(texts, indices, strict=True)]

        return draw

    return VideoSource(plan, load)


def chunk_starts(settings: CausalSettings, chunks: int) -> list[int]:
    """Pixel frames at which the chunks of a stream begin."""
    ends = itertools.accumulate(settings.layout.pixel_frames(chunk) for chunk in range(chunks))
    return [0, *ends][:chunks]
