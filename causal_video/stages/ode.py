"""Regression on trajectories of a teacher's ODE, at the times of the student's schedule, and how these are made.

Legend: N trajectories, K times, B batch, C channels, F latent frames; videos [B, C, F, h, w], states
[N, K, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stages.batch import (
    CausalTeacher,
    ForcingNetworks,
    ForcingStep,
    VideoBatch,
    chunk_uniform,
    isolated,
    over_frames,
)
from fewstep.causal_video.stages.losses import counted_weight, frame_loss
from fewstep.causal_video.stages.sections import OdeConfig
from fewstep.core.condition import Condition
from fewstep.core.data import PROMPTS_FILE, LatentSource, PromptConditions, read_prompts, rows_of_samples
from fewstep.core.paths import x0_from_velocity
from fewstep.core.randomness import Draw, sample_noise
from fewstep.core.teacher import Teacher
from fewstep.core.training.trainer import Trainer
from fewstep.kernels.mask import AttentionMask

# The folder in the run directory, and the file in it.
PAIRS_FOLDER, PAIRS_FILE = "ode_pairs", "ode_pairs.safetensors"
# Trajectories that are made at a time.
BATCH = 16
# Times are stored in fp64 and compared with those of a schedule.
SAME_TIME = 1e-9


@dataclass(frozen=True, eq=False)
class OdePairs:
    """Where trajectories of a teacher stand at some times, and where they end.

    Attributes:
        times: K falling times in (0, 1].
        states: [N, K, C, F, h, w].
        latents: [N, C, F, h, w], their ends.
        prompts: N.
        context: [N, C, F, h, w] clean video that a causal teacher saw of earlier chunks; None for a bidirectional one.

    Raises:
        ValueError: counts or shapes disagree.
    """

    times: tuple[float, ...]
    states: Tensor
    latents: Tensor
    prompts: tuple[str, ...]
    context: Tensor | None = None

    def __post_init__(self) -> None:
        count, expected = len(self.prompts), (len(self.prompts), len(self.times), *self.latents.shape[1:])
        if len(self.latents) != count or tuple(self.states.shape) != expected:
            raise ValueError(
                f"{count} prompts and {len(self.times)} times do not fit latents {tuple(self.latents.shape)} and "
                f"states {tuple(self.states.shape)}"
            )
        if self.context is not None and self.context.shape != self.latents.shape:
            raise ValueError(f"context {tuple(self.context.shape)} is not like latents {tuple(self.latents.shape)}")

    def save(self, folder: str | Path) -> None:
        """Write `ode_pairs.safetensors` and `prompts.txt` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "times": torch.tensor(self.times, dtype=torch.float64),
            "states": self.states.contiguous(),
            "latents": self.latents.contiguous(),
        }
        if self.context is not None:
            tensors["context"] = self.context.contiguous()
        (folder / PROMPTS_FILE).write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        save_file(tensors, folder / PAIRS_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> OdePairs:
        """Read a folder that `save` wrote. Raises ValueError that names what is missing or broken."""
        file = Path(folder) / PAIRS_FILE
        if not file.is_file():
            raise ValueError(f"{file} does not exist; leave ode.pairs empty to make trajectories in the run directory")
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}); delete it and make it again") from error
        missing = {"times", "states", "latents"} - tensors.keys()
        if missing:
            raise ValueError(f"{file} lacks {sorted(missing)}; it holds no trajectories")
        prompts = read_prompts(Path(folder) / PROMPTS_FILE)
        times = tuple(tensors["times"].tolist())
        return cls(times, tensors["states"], tensors["latents"], prompts, tensors.get("context"))

    def place_of(self, time: float) -> int:
        """Where a time stands in `times`. Raises ValueError when it does not."""
        for place, known in enumerate(self.times):
            if abs(known - time) < SAME_TIME:
                return place
        raise ValueError(f"the trajectories have no state at t = {time}, only at {self.times}: make them again")


@dataclass(frozen=True, eq=False)
class OdeBatch:
    """States x [B, C, F, h, w] at times t [B, F], the ends x0 of their trajectories, captions, and clean context."""

    x: Tensor
    t: Tensor
    x0: Tensor
    condition: Condition
    context: Tensor | None


@dataclass(frozen=True, eq=False)
class OdeSource:
    """Trajectories with the embeddings of their prompts, read in an order of their own."""

    pairs: OdePairs
    conditions: PromptConditions
    seed: int

    def batch(self, draw: Draw, settings: CausalSettings) -> OdeBatch:
        """Each chunk at a random time of its schedule; without clean context also at t = 0, where it is context."""
        pairs, layout = self.pairs, settings.layout
        rows = rows_of_samples(draw.indices, len(pairs.prompts), self.seed)
        x0 = pairs.latents[rows]
        uniform = chunk_uniform(draw, layout, "ode_step").cpu()
        x, chosen = x0.clone(), torch.zeros(len(rows), layout.chunks)
        for chunk in range(layout.chunks):
            times, frames = settings.schedule.of(chunk), slice(layout.start(chunk), layout.end(chunk))
            choices = len(times) + (pairs.context is None)
            for sample, row in enumerate(rows):
                step = min(int(uniform[sample, chunk] * choices), choices - 1)
                if step < len(times):
                    x[sample, :, frames] = pairs.states[row, pairs.place_of(times[step]), :, frames]
                    chosen[sample, chunk] = times[step]
        context = None if pairs.context is None else pairs.context[rows].to(draw.device)
        t = over_frames(chosen, layout).to(draw.device)
        return OdeBatch(x.to(draw.device), t, x0.to(draw.device), self.conditions.rows(rows), context)


def schedule_times(settings: CausalSettings) -> tuple[float, ...]:
    """All times of a schedule, falling."""
    return tuple(sorted({t for times in settings.schedule.times for t in times}, reverse=True))


def merged_grid(grid: Sequence[float], times: Sequence[float]) -> tuple[float, ...]:
    """A teacher's grid with further times on the way, falling, each once."""
    extra = [t for t in times if all(abs(t - other) >= SAME_TIME for other in grid)]
    return tuple(sorted([*grid, *extra], reverse=True))


@torch.no_grad()
def trajectory(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, grid: Sequence[float], times: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Euler steps over a grid: states [B, K, C, F, h, w] at `times`, and the end [B, C, F, h, w] at t = 0.

    Raises:
        ValueError: a time is not of the grid.
    """
    x, states = noise, {}
    for t, t_next in zip(grid, (*grid[1:], 0.0), strict=True):
        states.update({time: x for time in times if abs(time - t) < SAME_TIME})
        x = x + (t_next - t) * velocity(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
    if len(states) < len(times):
        raise ValueError(f"times {[t for t in times if t not in states]} are not of the grid")
    return torch.stack([states[time] for time in times], dim=1), x


def bidirectional_pairs(
    teacher: Teacher,
    prompts: PromptConditions,
    settings: CausalSettings,
    *,
    shape: tuple[int, ...],
    count: int,
    steps: int,
    guidance: float,
    seed: int,
) -> OdePairs:
    """Trajectories of the bidirectional teacher from noise, as in CausVid (arXiv:2412.07772).

    Trajectory i has prompt i modulo their number and noise of (seed, i).

    Args:
        teacher: the video model.
        prompts: what it is asked for.
        settings: whose schedule says the times.
        shape: (C, F, h, w).
        count: N.
        steps: of the teacher's own grid; the schedule's times come in addition.
        guidance: of the teacher.
        seed: of the noise.
    """
    wanted = schedule_times(settings)
    grid = merged_grid(teacher.family.teacher_grid(teacher.pipeline, steps), wanted)
    device = teacher.null_condition.device
    parts = []
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        condition = prompts.rows([number % len(prompts) for number in numbers])
        noise = sample_noise(seed, numbers, shape, stream="ode_pairs", device=device)
        run = trajectory(lambda x, t, c=condition: teacher.velocity(x, t, c, guidance), noise, grid, wanted)
        parts.append(tuple(part.cpu() for part in run))
    states, latents = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return OdePairs(wanted, states, latents, tuple(prompts.prompts[i % len(prompts)] for i in range(count)))


def causal_pairs(
    teacher: CausalTeacher,
    real: LatentSource,
    settings: CausalSettings,
    *,
    grid: Sequence[float],
    mask: AttentionMask,
    count: int,
    seed: int,
) -> OdePairs:
    """Trajectories of a causal teacher on clean context, all chunks at once in the packed call.

    A noisy chunk then determines its end, which the bidirectional teacher's does not when later chunks are hidden
    (Causal Forcing, arXiv:2602.02214).

    Args:
        teacher: the frozen causal network.
        real: videos for the context, with captions.
        settings: whose schedule says the times.
        grid: the teacher's own.
        mask: `masks.teacher_forcing`.
        count: N.
        seed: of the noise.
    """
    wanted = schedule_times(settings)
    times = merged_grid(grid, wanted)
    device = teacher.null_condition.device
    parts, prompts = [], []
    for start in range(0, count, BATCH):
        numbers = list(range(start, min(start + BATCH, count)))
        rows, context, condition = real.rows(numbers, device)
        context = context.float()
        noise = sample_noise(seed, numbers, tuple(context.shape[1:]), stream="ode_pairs", device=device)
        batch = VideoBatch(context, noise, condition, context, None, None, 0)
        run = trajectory(lambda x, t, b=batch: teacher.velocity(x, t, b, mask), noise, times, wanted)
        parts.append(tuple(part.cpu() for part in (*run, context)))
        prompts += [real.dataset.prompts[row] for row in rows]
    states, latents, context = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return OdePairs(wanted, states, latents, tuple(prompts), context)


@dataclass(frozen=True, eq=False)
class PairSources:
    """What trajectories are made from.

    Attributes:
        teacher: the bidirectional one.
        guidance: its scale.
        networks: with the causal teacher, where there is one.
        real: videos for the context of causal trajectories.
        prompts: of bidirectional ones.
        settings: whose schedule says the times.
        shape: (C, F, h, w).
        seed: of the noise.
    """

    teacher: Teacher
    guidance: float
    networks: ForcingNetworks
    real: LatentSource | None
    prompts: PromptConditions
    settings: CausalSettings
    shape: tuple[int, int, int, int]
    seed: int


def pairs_of_run(stage: OdeConfig, sources: PairSources, trainer: Trainer) -> OdePairs:
    """The trajectories in the run directory, made by process 0 if they are not there."""
    folder = trainer.directory.path / PAIRS_FOLDER
    if trainer.is_main and not folder.is_dir():
        make_pairs(stage, sources).save(folder)
    trainer.accelerator.wait_for_everyone()
    return OdePairs.load(folder)


def make_pairs(stage: OdeConfig, sources: PairSources) -> OdePairs:
    """Trajectories of the teacher that `source` names."""
    teacher, networks = sources.teacher, sources.networks
    if stage.source == "bidirectional":
        return bidirectional_pairs(
            teacher,
            sources.prompts,
            sources.settings,
            shape=sources.shape,
            count=stage.count,
            steps=stage.steps,
            guidance=sources.guidance,
            seed=sources.seed,
        )
    assert networks.teacher is not None
    assert sources.real is not None
    return causal_pairs(
        networks.teacher,
        sources.real,
        sources.settings,
        grid=teacher.family.teacher_grid(teacher.pipeline, stage.steps),
        mask=networks.packed,
        count=stage.count,
        seed=sources.seed,
    )


def ode_step(batch: OdeBatch, networks: ForcingNetworks, stage: OdeConfig) -> ForcingStep:
    """Regression on the end of trajectories, every chunk at a random step of its own.

    From the bidirectional teacher: block-causal, chunks at t = 0 are context and do not count (CausVid,
    arXiv:2412.07772; Self-Forcing, arXiv:2506.08009). From a causal teacher: on the clean context that its trajectories
    were made on (after Causal Forcing, arXiv:2602.02214; the packed form is our reading).
    """
    if batch.context is None:
        velocity = networks.causal_velocity(batch.x, batch.t, batch.condition)
    else:
        held = VideoBatch(batch.x0, batch.x, batch.condition, batch.context, None, None, 0)
        velocity = networks.on_context(held)(batch.x, batch.t, batch.condition)
    prediction = x0_from_velocity(batch.x, velocity, batch.t)
    found = frame_loss(prediction, batch.x0, counted_weight(batch.t > 0), frames=stage.frames)
    return ForcingStep(found.loss, {"regression_error": found.error.mean(), **isolated(found)})
