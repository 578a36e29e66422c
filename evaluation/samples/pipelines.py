"""Stores of stock pipelines: one pipeline in memory at a time, whatever is missing drawn, and nothing loaded otherwise.

Shapes: pixels [B, 3, H, W] or [B, 3, T, H, W] in [0, 1].
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluation.generation import generate, load_pipeline
from fewstep.evaluation.samples.draw import fill, missing_blocks
from fewstep.evaluation.samples.identity import pipeline_fingerprint
from fewstep.evaluation.samples.store import SamplePlan, SampleStore, prompts_digest
from fewstep.evaluation.systems import System


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: how many for each of `seeds`, in batches, on which device, into which folder.

    `dtype` None is that of the weights as stored. `rank` of `world_size` processes draws its share; `wait` returns when
    all have come to the same place.
    """

    folder: Path
    samples: int = 2000
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 16
    device: str = "cpu"
    dtype: str | None = None
    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None


class OnePipeline:
    """Loads pipelines, of which the last one alone stays."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._key: tuple[str, str] | None = None
        self._pipeline: Any = None

    def get(self, path: str, dtype: str) -> Any:
        """The pipeline of a folder in that dtype, loaded unless it is the one that is there."""
        if not self.holds(path, dtype):
            self.free()
            self._pipeline = load_pipeline(path, device=self.device, dtype=getattr(torch, dtype))
            self._key = (path, dtype)
        return self._pipeline

    def holds(self, path: str, dtype: str) -> bool:
        """Whether that pipeline is the one in memory."""
        return self._key == (path, dtype)

    def free(self) -> None:
        """Give its memory back before the next one is loaded."""
        self._pipeline, self._key = None, None
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()


def sample_plan(
    system: System, prompts: Sequence[str], *, seed: int, dtype: str | None, fingerprint: str
) -> SamplePlan:
    """What a system draws for these prompts with that seed."""
    grid = {name: value for name, value in asdict(system.grid).items() if value is not None}
    call = {"steps": system.steps, "guidance": system.guidance, **grid}
    own = dtype or system.dtype
    return SamplePlan(Path(system.path).name, fingerprint, call, own, seed, prompts_digest(prompts))


def store_folder(parent: Path, system: System, plan: SamplePlan, *, kind: str = "") -> Path:
    """Where such samples lie below `parent`: named for people, and by a digest of the plan."""
    digest = hashlib.sha256(json.dumps(asdict(plan), sort_keys=True).encode()).hexdigest()[:10]
    name = re.sub(r"[^\w.-]+", "_", system.name)
    return parent / f"{name}_{system.steps}step_seed{plan.seed}{kind}_{digest}"


def draw_stores(
    systems: Sequence[System], prompts: Sequence[str], sampling: Sampling, *, count: int | None = None, kind: str = ""
) -> list[list[SampleStore]]:
    """A finished store for each system and seed, samples 0 ... count - 1 (all of `sampling` by default).

    Samples that are there are kept. Processes divide each store; when this returns in process 0, all are done.
    """
    holder, stores = OnePipeline(sampling.device), []
    fingerprints = {path: pipeline_fingerprint(path) for path in dict.fromkeys(one.path for one in systems)}
    for system in systems:
        own = []
        for seed in sampling.seeds:
            mark = fingerprints[system.path]
            plan = sample_plan(system, prompts, seed=seed, dtype=sampling.dtype, fingerprint=mark)
            own.append(_draw_one(holder, system, plan, prompts, sampling, count=count or sampling.samples, kind=kind))
        stores.append(own)
    holder.free()
    return stores


def _draw_one(
    holder: OnePipeline,
    system: System,
    plan: SamplePlan,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    count: int,
    kind: str,
) -> SampleStore:
    folder = store_folder(sampling.folder, system, plan, kind=kind)
    # The first process makes the folder, so that no other one finds it half made.
    if sampling.rank == 0:
        SampleStore(folder, plan)
    sampling.wait()
    store = SampleStore(folder, plan)

    def draw(texts: Sequence[str], indices: Sequence[int]) -> Tensor:
        pipeline = holder.get(system.path, plan.dtype)
        call = {"steps": system.steps, "guidance": system.guidance, "grid": system.grid}
        return generate(pipeline, texts, indices=indices, seed=plan.seed, batch_size=len(texts), **call)

    if missing_blocks(store, count, batch_size=sampling.batch_size):
        share = {"rank": sampling.rank, "world_size": sampling.world_size}
        fill(store, draw, prompts, count, batch_size=sampling.batch_size, **share)
    sampling.wait()
    if sampling.rank == 0:
        store.merge()
    sampling.wait()
    return store
