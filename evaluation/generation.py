"""Images of a diffusers pipeline, each a function of (seed, index) alone, and the plain calls that are timed.

Shapes: pixels [N, 3, H, W] in [0, 1] on the CPU, latents [B, C, h, w]; of videos [N, 3, T, H, W] and [B, C, F, h, w].
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import AnyFlowPipeline, DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from fewstep.core.condition import Condition
from fewstep.core.export.adapters import load_adapter_files
from fewstep.core.export.contract import CALL_KEY
from fewstep.core.families.family import Family
from fewstep.core.families.table import build_family
from fewstep.core.families.wan import anyflow_family
from fewstep.core.randomness import sample_noise, shared_integer
from fewstep.core.teacher_files import check_pipeline_folder, variant_of
from fewstep.evaluation.systems import OWN_GRID, StepGrid, System, base_of, require_pipeline

# All prompts of the embedded digits at once; more would not fit beside a large text encoder.
ENCODE_BATCH = 256


def load_pipeline(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline in the directory `path`, as plain `DiffusionPipeline.from_pretrained` loads it, without its bars.

    Adapters of a LoRA export are put on the model that they are for, as its card says. Raises ValueError when `path` is
    no pipeline directory.
    """
    require_pipeline(path)
    folder = base_of(path)
    # Stock loading takes a null in the index (SD3 without T5) for a missing part unless it is passed as None as well.
    absent = dict.fromkeys(check_pipeline_folder(folder))
    choice: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "variant": variant_of(folder, None)}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **choice, **absent)
    if folder != Path(path):
        load_adapter_files(pipeline, path)
        scheduler = json.loads((Path(path) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        kind = getattr(diffusers, scheduler["_class_name"])
        pipeline.register_modules(scheduler=kind.from_pretrained(path, subfolder="scheduler"))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_call(pipeline: Any, prompts: list[str], *, steps: int, guidance: float, grid: StepGrid = OWN_GRID) -> Tensor:
    """The call a user writes: `pipeline(prompts, num_inference_steps=..., guidance_scale=...)`."""
    family = _family_of(pipeline)
    size = {"height": grid.height, "width": grid.width, "frames": grid.frames}
    arguments = grid.arguments() | family.call_arguments(pipeline, **size)
    arguments |= family.text_arguments(prompts, guided=_is_guided(family, guidance, grid))
    arguments |= _guidance_arguments(family, guidance, grid)
    return _pixels_of(pipeline(num_inference_steps=steps, output_type="pt", **arguments))


def _is_guided(family: Family, guidance: float, grid: StepGrid) -> bool:
    """Whether a call makes a second one of the network. An export's own call does not."""
    return grid.own_call is None and family.told_guidance is None and guidance > 1.0


def _guidance_arguments(family: Family, guidance: float, grid: StepGrid) -> dict[str, Any]:
    """An export's own call; else for u + guidance (c - u), or for a network that is told its guidance, this one."""
    if grid.own_call is not None:
        return dict(grid.own_call)
    if family.told_guidance is not None:
        return family.telling(guidance).guidance_arguments(1.0)
    return family.guidance_arguments(guidance)


def _family_of(pipeline: Any) -> Family:
    """How a pipeline is called; an exported AnyFlow pipeline is called as Wan's."""
    return anyflow_family(pipeline) if isinstance(pipeline, AnyFlowPipeline) else build_family(pipeline)


def _family_told_text(pipeline: Any) -> Family:
    """How a pipeline is called. Raises ValueError for one that is told a picture beside the text."""
    family = _family_of(pipeline)
    if family.takes_picture:
        raise ValueError(
            f"{type(pipeline).__name__} is told a picture with each prompt, which the evaluation does not give: judge "
            "finished videos (--pictures), or its text-to-video model"
        )
    return family


def _pixels_of(output: Any) -> Tensor:
    """Pictures [B, 3, H, W], or videos [B, 3, T, H, W], whose frames stock pipelines give before the channels."""
    return output.frames.transpose(1, 2) if hasattr(output, "frames") else output.images


class Holder(Protocol):
    """Where a call finds its pipeline when its turn comes."""

    def get(self, path: str, dtype: str) -> Any: ...
    def holds(self, path: str, dtype: str) -> bool: ...


@dataclass(frozen=True)
class StockCall:
    """A plain call with fixed prompts, for `measure_latency`; the pipeline is loaded when it is needed."""

    holder: Holder
    system: System
    dtype: str
    prompts: tuple[str, ...]

    @property
    def images(self) -> int:
        return len(self.prompts)

    def prepare(self) -> bool:
        """Load the pipeline; tells whether it was not there before."""
        known = self.holder.holds(self.system.path, self.dtype)
        self.holder.get(self.system.path, self.dtype)
        return not known

    def run(self) -> Tensor:
        system, pipeline = self.system, self.holder.get(self.system.path, self.dtype)
        return plain_call(pipeline, list(self.prompts), steps=system.steps, guidance=system.guidance, grid=system.grid)


@contextmanager
def _noise_per_image(pipeline: DiffusionPipeline) -> Iterator[list[torch.Generator]]:
    """Give the scheduler one generator per image for the steps inside; the caller fills the list for each batch.

    Stable Diffusion 3 and others keep their generator from the scheduler, which then draws from torch's global one. A
    subclass of the scheduler's own class hands it the list instead: equal in distribution, independent of the batch.
    """
    stock = pipeline.scheduler
    generators: list[torch.Generator] = []
    if "generator" not in inspect.signature(stock.step).parameters:
        yield generators
        return

    class PerImageScheduler(type(stock)):
        # Pipelines look at the signature to learn which arguments a scheduler takes.
        @functools.wraps(type(stock).step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **{**kwargs, "generator": generators})

    # Without the private entries, one of which makes from_config forget values that were changed after loading, and
    # without the call of an export, of which it would tell again at each batch.
    kept = [name for name in stock.config if not name.startswith("_") and name != CALL_KEY]
    settings = {name: stock.config[name] for name in kept}
    pipeline.scheduler = PerImageScheduler.from_config(settings)
    try:
        yield generators
    finally:
        pipeline.scheduler = stock


@dataclass(frozen=True)
class _Prompts:
    """Prompts encoded once: the empty prompt in row 0 and the row of each other one."""

    pipeline: DiffusionPipeline
    family: Family
    rows: dict[str, int]
    conditions: Condition

    @classmethod
    def encode(cls, pipeline: DiffusionPipeline, prompts: Sequence[str], *, family: Family) -> _Prompts:
        unique = list(dict.fromkeys(prompts))
        rows = {prompt: row for row, prompt in enumerate(unique, start=1)}
        starts = range(0, len(unique), ENCODE_BATCH)
        parts = [family.encode_prompts(pipeline, unique[start : start + ENCODE_BATCH]) for start in starts]
        return cls(pipeline, family, rows, Condition.cat([family.encode_null(pipeline), *parts]))

    def arguments(self, prompts: Sequence[str], *, guided: bool) -> dict[str, Any]:
        """Arguments of the stock call in place of the prompts."""
        condition = self.conditions.index(torch.tensor([self.rows[prompt] for prompt in prompts]))
        null = self.conditions.index(torch.zeros(len(prompts), dtype=torch.int64)) if guided else None
        found = self.family.prompt_arguments(self.pipeline, condition, null)
        assert found is not None
        return found


@contextmanager
def _encoded_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, family: Family
) -> Iterator[_Prompts | None]:
    """Encoded prompts, with the network as its family wants it inside; None where the pipeline wants texts."""
    if family.prompt_arguments(pipeline, family.encode_null(pipeline), None) is None:
        yield None
        return
    network: Any = family.network(pipeline)
    # AnyFlow's network has none, and its family changes nothing.
    stock = dict(getattr(network, "attn_processors", {}))
    family.prepare_network(network)
    try:
        yield _Prompts.encode(pipeline, prompts, family=family)
    finally:
        if stock:
            network.set_attn_processor(stock)


def _global_random_state(device: torch.device) -> Tensor:
    """States of the global generators that a pipeline on `device` could draw from."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device).cpu()]) if device.type == "cuda" else state


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    indices: Sequence[int],
    seed: int,
    steps: int,
    guidance: float,
    batch_size: int = 64,
    grid: StepGrid = OWN_GRID,
) -> Tensor:
    """Sample i of prompt i, each a function of (pipeline, prompt, seed, index) alone.

    Pixels are [N, 3, H, W] in [0, 1], of pipelines of videos [N, 3, T, H, W], in fp32 on the CPU.

    Initial latents are `sample_noise(seed, indices, ..., stream="latents")`; the noise between steps comes from one
    generator per image. The pipeline is left as it was found.

    Raises:
        ValueError: prompts and indices differ in number or are none; a number is out of range; or the scheduler draws
            from the global generator in spite of all this and the batch holds several images.
    """
    if len(prompts) != len(indices) or len(prompts) == 0:
        raise ValueError(f"{len(prompts)} prompts for {len(indices)} indices; give one per image, at least one")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps is {steps} and batch_size {batch_size}; use at least 1")
    family = _family_told_text(pipeline)
    shape = family.latent_shape(pipeline, grid.height, grid.width, frames=grid.frames)
    size = family.call_arguments(pipeline, height=grid.height, width=grid.width, frames=grid.frames)
    name = type(pipeline.scheduler).__name__
    parts = []
    starts = range(0, len(prompts), batch_size)
    with _encoded_prompts(pipeline, prompts, family=family) as encoded, _noise_per_image(pipeline) as generators:
        for start in tqdm(starts, desc=f"{steps} steps, seed {seed}", unit="batch", leave=False, disable=None):
            texts, rows = list(prompts[start : start + batch_size]), indices[start : start + batch_size]
            keys = [shared_integer(seed, index, "scheduler", 2**63) for index in rows]
            generators[:] = [torch.Generator().manual_seed(key) for key in keys]
            guided = _is_guided(family, guidance, grid)
            if encoded is None:
                arguments = family.text_arguments(texts, guided=guided)
            else:
                arguments = encoded.arguments(texts, guided=guided)
            arguments |= _guidance_arguments(family, guidance, grid)
            latents = sample_noise(seed, rows, shape, stream="latents", device=pipeline.device, dtype=pipeline.dtype)
            arguments |= family.latent_arguments(pipeline, latents, keys) | grid.arguments() | size
            with torch.random.fork_rng():
                # For schedulers without a generator argument: right for a single image, and noticed for more.
                torch.manual_seed(keys[0])
                before = _global_random_state(pipeline.device)
                output = pipeline(num_inference_steps=steps, output_type="pt", **arguments)
                drawn = not torch.equal(before, _global_random_state(pipeline.device))
            if drawn and len(texts) > 1:
                raise ValueError(
                    f"{name} draws from torch's global generator, so images would depend on the batch; use batch_size 1"
                )
            parts.append(_pixels_of(output).float().cpu())
    return torch.cat(parts)
