"""The record of streaming: what the cache saves, whether cost and memory stay flat, and how soon frames are there.

Legend: B batch, C channels, F latent frames, h x w latent pixels, N text tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise, VideoCondition, denoise_chunk
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.calls import per_frame
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy, QuantiseKind
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.speed import StreamSpeed, timed
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import sample_noise
from fewstep.evaluation.provenance import collect_provenance
from fewstep.kernels.mask import AttentionMask

MEMORY_FILE = Path("/proc/self/statm")
QUANTISED: tuple[QuantiseKind, ...] = ("none", "int8", "fp8")


@dataclass(frozen=True, eq=False)
class System:
    """What is timed: a student, a VAE, one prompt [1, N, width], and (C, h, w) of a latent frame."""

    name: str
    network: CausalWan
    vae: AutoencoderKLWan
    text: Tensor
    size: tuple[int, int, int]
    settings: CausalSettings

    def session(self, *, decode: bool, policy: CachePolicy | None = None) -> StreamSession:
        """A stream, under another policy if one is given."""
        settings = self.settings if policy is None else replace(self.settings, policy=policy)
        noise = ChunkNoise(0, (0,), self.size)
        return StreamSession(self.network, self.text, noise, settings, vae=self.vae if decode else None)


@dataclass(frozen=True)
class ChunkCost:
    """Seconds of one chunk, medians over repeats.

    Attributes:
        chunk: its number.
        frames: latent frames up to its end.
        window: with the rolling cache of the student's policy: denoising calls and the context call.
        whole: with a cache that forgets nothing.
        recomputed: without a cache: each denoising call on all frames so far, under the block-causal mask.
    """

    chunk: int
    frames: int
    window: float
    whole: float
    recomputed: float


@dataclass(frozen=True)
class PrefixResult:
    """Costs of the chunks of one video, and how they grow from its first third to its last.

    Attributes:
        costs: of each chunk.
        ratio_last: recomputed over window, in the last chunk.
        growth_window: mean cost of the last third over that of the first third that fills the window.
        growth_whole: the same with the whole cache.
        growth_recomputed: the same without a cache.
        difference: largest difference of the last chunk with the whole cache and recomputed, of the largest latent.
    """

    costs: tuple[ChunkCost, ...]
    ratio_last: float
    growth_window: float
    growth_whole: float
    growth_recomputed: float
    difference: float


@dataclass(frozen=True)
class MemoryPoint:
    """Memory after a chunk: of the process (None where the system does not tell), and of the cache.

    `chunk_seconds` is the mean of the chunks since the point before.
    """

    chunk: int
    resident_bytes: int | None
    cache_bytes: int
    chunk_seconds: float


@dataclass(frozen=True)
class CacheSize:
    """Size of a full cache in one storage, in bytes, and of its share of the plain one."""

    storage: str
    bytes: int
    share: float


@dataclass(frozen=True)
class StreamingRecord:
    """All measures of one system."""

    system: str
    parameters: int
    tokens_per_frame: int
    layout: tuple[int, ...]
    policy: CachePolicy
    calls: tuple[int, ...]
    prefix: PrefixResult
    memory: tuple[MemoryPoint, ...]
    latents_alone: StreamSpeed
    decoded: StreamSpeed
    pipelined: StreamSpeed
    cache_sizes: tuple[CacheSize, ...]


def random_system(*, layers: int = 6, heads: int = 4, head_width: int = 32, side: int = 16) -> System:
    """A Wan with random weights and a small random VAE: latents of side x side, (side / 2)^2 tokens a frame."""
    width = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=16,
            out_channels=16,
            text_dim=width,
            freq_dim=64,
            ffn_dim=4 * heads * head_width,
            num_layers=layers,
        )
        vae = AutoencoderKLWan(
            base_dim=16, z_dim=16, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True]
        )
    settings = CausalSettings(ChunkLayout((3,)), CachePolicy(9, 3, "static"), StepSchedule.steps([4, 2]))
    network = CausalWan(transformer.eval().requires_grad_(False))
    text = sample_noise(0, [0], (32, width), stream="text")
    return System("random Wan", network, vae.eval().requires_grad_(False), text, (16, side, side), settings)


def pipeline_system(directory: str) -> System:
    """An exported student. Raises ValueError as `CausalVideoPipeline.from_pretrained`, and for one that is steered."""
    pipe = CausalVideoPipeline.from_pretrained(directory)
    if pipe.network.extra_channels > 0:
        raise ValueError(f"{directory} is steered by actions, and these streams have none: give a student of text")
    text = pipe.encode(["a seven moving left slowly"])
    return System(Path(directory).name, pipe.network, pipe.stock.vae, text, pipe.latent_size(), pipe.settings)


@torch.no_grad()
def prefix_costs(system: System, *, chunks: int, repeats: int) -> PrefixResult:
    """Time each chunk of a video with the rolling cache, with a whole one and without, in turns.

    The whole cache makes the video; without a cache the same chunk is made from it, which gives the same numbers.
    """
    settings, network = system.settings, system.network
    noise, prompt = ChunkNoise(0, (0,), system.size), network.prompt(system.text)
    window, whole = (RollingCache.empty(settings.layout, policy) for policy in (settings.policy, KEEP_ALL))
    past = torch.empty(1, system.size[0], 0, *system.size[1:])
    costs, difference = [], float("nan")
    for chunk in range(chunks):
        length, times = settings.layout.length(chunk), settings.schedule.of(chunk)
        draws = [noise.draw(chunk, step, length, system.text) for step in range(len(times))]
        layout = settings.layout.extended(chunk + 1)
        mask = masks.block_causal(layout, network.tokens_per_frame(draws[0]), KEEP_ALL, device=past.device)
        timings = [
            timed_chunk(network, prompt, draws, times, window=window, whole=whole, past=past, mask=mask)
            for _ in range(repeats)
        ]
        last = timings[-1]
        window, whole = last.window, last.whole
        past = torch.cat([past, last.made], dim=2)
        difference = float((last.made - last.again).abs().max() / last.again.abs().max())
        seconds = zip(*(timing.seconds for timing in timings), strict=True)
        costs.append(ChunkCost(chunk, layout.frames, *(median(part) for part in seconds)))
    return prefix_result(costs, settings, difference)


@dataclass(frozen=True, eq=False)
class TimedChunk:
    """One chunk made three ways: the caches after it, the chunk from the whole cache and without one, and seconds."""

    window: RollingCache
    whole: RollingCache
    made: Tensor
    again: Tensor
    seconds: tuple[float, ...]


def timed_chunk(
    network: CausalWan,
    prompt: Prompt,
    draws: Sequence[Tensor],
    times: Sequence[float],
    *,
    window: RollingCache,
    whole: RollingCache,
    past: Tensor,
    mask: AttentionMask,
) -> TimedChunk:
    """Make a chunk with the rolling cache, with a whole one and without, one after the other."""
    marks = [time.perf_counter()]
    _, next_window = cached_chunk(network, prompt, draws, times, window)
    marks.append(time.perf_counter())
    made, next_whole = cached_chunk(network, prompt, draws, times, whole)
    marks.append(time.perf_counter())
    again = recomputed_chunk(network, prompt, draws, times, past=past, mask=mask)
    marks.append(time.perf_counter())
    seconds = tuple(after - before for before, after in itertools.pairwise(marks))
    return TimedChunk(next_window, next_whole, made, again, seconds)


def cached_chunk(
    network: CausalWan, prompt: Prompt, draws: Sequence[Tensor], times: Sequence[float], cache: RollingCache
) -> tuple[Tensor, RollingCache]:
    """A chunk [B, C, n, h, w] and the cache after it: len(times) calls and one for the context."""
    result = denoise_chunk(network, draws, times, VideoCondition(prompt), cache.read())
    clean = torch.zeros(len(result.x0))
    kept = network.append(result.x0, clean, prompt, cache.read()).keys_values
    assert kept is not None
    return result.x0, cache.commit(kept)


def recomputed_chunk(
    network: CausalWan,
    prompt: Prompt,
    draws: Sequence[Tensor],
    times: Sequence[float],
    *,
    past: Tensor,
    mask: AttentionMask,
) -> Tensor:
    """The same chunk without a cache: len(times) calls on the clean past and the chunk."""
    x = draws[0]
    for step, t in enumerate(times):
        clock = torch.full((len(x),), t)
        both = torch.cat([torch.zeros(len(x), past.shape[2]), per_frame(clock, x.shape[2])], dim=1)
        velocity = network.causal(torch.cat([past, x], dim=2), both, prompt, mask=mask)[:, :, past.shape[2] :]
        x0 = x0_from_velocity(x, velocity, clock)
        if step + 1 == len(times):
            return x0
        x = add_noise(x0, draws[step + 1], torch.full((len(x),), times[step + 1]))
    raise ValueError("a chunk needs at least one time")


def prefix_result(costs: Sequence[ChunkCost], settings: CausalSettings, difference: float) -> PrefixResult:
    """Growth and ratio of costs. Raises ValueError for a video that is too short to see growth."""
    window = settings.policy.chunk_window(settings.layout)
    # The first chunk has a schedule of its own, and those before the window is full are cheaper.
    filled = 1 if window.window is None else window.window + window.sink
    steady = [cost for cost in costs if cost.chunk >= max(1, filled)]
    if len(steady) < 3:
        raise ValueError(f"{len(costs)} chunks are too few: the window is full after {filled}, give 3 more at least")
    third = len(steady) // 3
    first, last = steady[:third], steady[-third:]
    return PrefixResult(
        costs=tuple(costs),
        ratio_last=costs[-1].recomputed / costs[-1].window,
        growth_window=mean(c.window for c in last) / mean(c.window for c in first),
        growth_whole=mean(c.whole for c in last) / mean(c.whole for c in first),
        growth_recomputed=mean(c.recomputed for c in last) / mean(c.recomputed for c in first),
        difference=difference,
    )


def memory_points(system: System, *, chunks: int, every: int) -> tuple[MemoryPoint, ...]:
    """Memory along a stream without VAE; the first point is after one chunk."""
    session, seconds = system.session(decode=False), []
    points: list[MemoryPoint] = []
    for output in session.stream(chunks):
        seconds.append(output.seconds.total)
        if output.chunk % every == 0 or output.chunk == chunks - 1:
            size = session.snapshot().cache.bytes()
            points.append(MemoryPoint(output.chunk, resident_bytes(), size, mean(seconds)))
            seconds.clear()
    return tuple(points)


def resident_bytes() -> int | None:
    """Memory of this process that is in use now; None where the system does not say."""
    if not MEMORY_FILE.is_file():
        return None
    return int(MEMORY_FILE.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cache_sizes(system: System) -> tuple[CacheSize, ...]:
    """A full cache in each storage."""
    window = system.settings.policy.chunk_window(system.settings.layout)
    chunks = 3 if window.window is None else window.window + window.sink + 1
    sizes = []
    for storage in QUANTISED:
        session = system.session(decode=False, policy=replace(system.settings.policy, quantise=storage))
        list(session.stream(chunks))
        sizes.append(session.snapshot().cache.bytes())
    return tuple(CacheSize(name, size, size / sizes[0]) for name, size in zip(QUANTISED, sizes, strict=True))


def streaming_record(
    system: System, *, prefix_chunks: int, repeats: int, memory_chunks: int, speed_chunks: int
) -> StreamingRecord:
    """Every measure of one system, after an untimed chunk."""
    list(system.session(decode=True).stream(2))
    speeds = [
        timed(system.session(decode=decode).stream(speed_chunks, pipelined=pipelined))[1]
        for decode, pipelined in ((False, False), (True, False), (True, True))
    ]
    settings = system.settings
    return StreamingRecord(
        system=system.name,
        parameters=sum(p.numel() for p in system.network.parameters()),
        tokens_per_frame=system.network.tokens_per_frame(torch.empty(0, system.size[0], 1, *system.size[1:])),
        layout=settings.layout.lengths,
        policy=settings.policy,
        calls=tuple(len(times) for times in settings.schedule.times),
        prefix=prefix_costs(system, chunks=prefix_chunks, repeats=repeats),
        memory=memory_points(system, chunks=memory_chunks, every=max(1, memory_chunks // 10)),
        latents_alone=speeds[0],
        decoded=speeds[1],
        pipelined=speeds[2],
        cache_sizes=cache_sizes(system),
    )


def write_streaming(records: Sequence[StreamingRecord], output: str | Path, *, command: Sequence[str]) -> Path:
    """Write the records with their provenance as JSON; gives the path."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "provenance": asdict(collect_provenance(command[0], arguments=command[1:])),
        "text_encoder": "not in any time: prompts are encoded once, when a stream is opened",
        "systems": [asdict(record) for record in records],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
