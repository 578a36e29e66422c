"""Self-forcing: training videos are generated chunk by chunk as in deployment (arXiv:2506.08009, Algorithm 1).

Each chunk gets exactly one call with gradients, its exit step. What later chunks see of it has no graph: prefixes are
immutable values, so no gradient leaks from chunk to chunk, and a call can be made again to the last bit.

Legend: B batch, C channels, F frames of the rollout, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.causal_video.cache.rolling import RollingCache, recache
from fewstep.causal_video.denoise import ChunkNoise, ChunkResult, ExitStep, VideoCondition, denoise_chunk
from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.calls import condition_first_frame
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.model.prefix import KeysValues
from fewstep.causal_video.settings import CausalSettings
from fewstep.core.paths import add_noise


@dataclass(frozen=True, eq=False)
class Rollout:
    """A generated video.

    Attributes:
        video: [B, C, F, h, w] predictions of the exit steps, with a graph where gradients were on.
        exits: one per chunk, for `replay`.
        cache: after the last chunk; a longer rollout goes on from it.
    """

    video: Tensor
    exits: tuple[ExitStep, ...]
    cache: RollingCache


def rollout(
    network: CausalWan,
    condition: VideoCondition,
    noise: ChunkNoise,
    settings: CausalSettings,
    *,
    exits: Sequence[int],
    cache: RollingCache | None = None,
    exit_network: nn.Module | None = None,
    replayable: bool = True,
) -> Rollout:
    """Generate len(exits) chunks; each stops at its exit step, and that call alone builds a graph.

    Flow maps take the steps of `steps_to_exit`, and contexts are those of `context_of`. Text keys and values are made
    once for calls without gradients, and again in each exit call, where their projections get a gradient.

    Args:
        network: the student. Its mode and the caller's grad mode are used as they are.
        condition: text as embeddings [B, N, width]; `extra` begins with the first frame that is generated.
        noise: of the stream.
        settings: layout, policy and schedule.
        exits: exit step of each chunk, see `StepSchedule.exits`; in every process the same, or collectives never end.
        cache: goes on from here; None starts a video.
        exit_network: called in place of `network` at the exits, for instance its DDP wrapper.
        replayable: keep what each exit saw: all keys and values, those too that the cache has forgotten.

    Raises:
        ValueError: no chunks, an exit that a chunk does not have, an image in the middle of a stream, or a cache of
            other settings.
    """
    cache = RollingCache.empty(settings.layout, settings.policy) if cache is None else cache
    if cache.plan.layout != settings.layout or cache.plan.policy != settings.policy:
        raise ValueError("the cache was filled under another layout or policy than these settings have")
    if network.has_two_times and settings.policy.noisy_from is not None:
        raise ValueError("noisy_from with a network of two times, which has clean context: leave it out")
    if len(exits) == 0:
        raise ValueError("exits is empty: give the exit step of each chunk that is to be generated")
    if condition.image is not None and cache.next_chunk != 0:
        raise ValueError(f"an image is the first frame of a video, and this stream is at chunk {cache.next_chunk}")
    prompt = condition.text if isinstance(condition.text, Prompt) else network.prompt(condition.text)
    first_frame = settings.layout.start(cache.next_chunk)
    results: list[ChunkResult] = []
    for exit_step in exits:
        chunk = cache.next_chunk
        frames, times = settings.layout.length(chunk), settings.schedule.of(chunk)
        if not 0 <= exit_step < len(times):
            raise ValueError(f"chunk {chunk} has steps 0 to {len(times) - 1}, got the exit {exit_step}")
        part = condition.of_chunk(settings.layout.start(chunk) - first_frame, frames, is_first=chunk == 0, text=prompt)
        made, last = steps_to_exit(times, exit_step, jumps=network.has_two_times)
        drawn = [noise.draw(chunk, step, frames, prompt.tokens) for step in range(len(made))]
        collect = settings.policy.is_noisy(chunk) and exit_step == len(times) - 1
        how = {"collect": collect, "exit_network": exit_network, "last": last}
        result = denoise_chunk(network, drawn, made, part, cache.read(), **how)
        results.append(result if replayable else result.without_context())
        renoise = noise.draw(chunk, len(times), frames, result.x0)
        cache = cache.commit(context_of(network, result, part, context_time(settings, chunk), renoise))
    video = torch.cat([result.x0 for result in results], dim=2)
    return Rollout(video, tuple(result.exit for result in results), cache)


def steps_to_exit(times: Sequence[float], exit_step: int, *, jumps: bool) -> tuple[Sequence[float], float]:
    """Times of the calls up to an exit, and where the exit ends.

    A flow map (`jumps`) that exits early comes there by one jump from the start, makes the step of the schedule, and
    goes on to 0 by another (backward simulation of AnyFlow, arXiv:2605.13724); at the last exit it makes the calls of
    deployment, which is ours.
    """
    if not jumps or exit_step == len(times) - 1:
        return times[: exit_step + 1], 0.0
    return times[:1] if exit_step == 0 else (times[0], times[exit_step]), times[exit_step + 1]


@torch.no_grad()
def switched_rollout(
    network: CausalWan,
    condition: VideoCondition,
    text: Tensor | Prompt,
    noise: ChunkNoise,
    settings: CausalSettings,
    *,
    exits: Sequence[int],
    at_chunk: int,
    recached: bool = True,
) -> Rollout:
    """A rollout from the start of a video, without a graph or a replay, whose text changes from a chunk on (LongLive,
    arXiv:2509.22622): what `StreamSession.set_prompt` does in a stream.

    Args:
        network: the student.
        condition: until then.
        text: from then on, embeddings [B, N, width].
        noise: of the stream.
        settings: layout, policy and schedule.
        exits: the last step of each chunk, see `rollout`.
        at_chunk: first chunk under the other text, from 1 on; the number of exits where there is none.
        recached: compute the stored keys and values again under it, the sink excepted; else they stay.

    Raises:
        ValueError: at_chunk is none of these.
    """
    if not 1 <= at_chunk <= len(exits):
        raise ValueError(f"at_chunk is {at_chunk}; the text can change at chunk 1 to {len(exits)}")
    before = rollout(network, condition, noise, settings, exits=exits[:at_chunk], replayable=False)
    cache, prompt = before.cache, text if isinstance(text, Prompt) else network.prompt(text)
    if recached:
        chunks = before.video.split([step.x.shape[2] for step in before.exits], dim=2)
        shown: list[tuple[Tensor, Tensor]] = []
        for number in (entry.segment.chunk for entry in cache.entries):
            step, x0, image = before.exits[number], chunks[number], condition.image if number == 0 else None
            clean = condition_first_frame(x0, torch.zeros_like(x0[:, 0, 0, 0, 0]), image)
            shown.append((step.x, step.t) if settings.policy.is_noisy(number) else clean)
        cache = recache(network, cache, [x for x, _ in shown], prompt, times=[t for _, t in shown])
    if at_chunk == len(exits):
        return Rollout(before.video, before.exits, cache)
    later = {"exits": exits[at_chunk:], "cache": cache, "replayable": False}
    after = rollout(network, VideoCondition(prompt), noise, settings, **later)
    return Rollout(torch.cat([before.video, after.video], dim=2), (*before.exits, *after.exits), after.cache)


def context_time(settings: CausalSettings, chunk: int) -> float:
    """The time at which a chunk is shown to later ones: 0, or under noisy context the last of its schedule."""
    return settings.schedule.of(chunk)[-1] if settings.policy.is_noisy(chunk) else 0.0


@torch.no_grad()
def context_of(
    network: CausalWan, result: ChunkResult, condition: VideoCondition, time: float, noise: Tensor
) -> KeysValues:
    """Keys and values that later chunks see of a denoised one, without a graph.

    Those of the exit call if it collected them (noisy context, full schedule); else of a call on the prediction,
    noised to `time`: 0 for clean context, the last time of the schedule where the exit came early (Causal-rCM).
    """
    if result.keys_values is not None:
        return result.keys_values.detach()
    x, t = shown_of(result, condition, time, noise)
    output = network.append(x, t, condition.text, result.exit.prefix, extra=condition.extra)
    assert output.keys_values is not None
    return output.keys_values


def shown_of(result: ChunkResult, condition: VideoCondition, time: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What later chunks see of a denoised one [B, C, n, h, w], and its times [B, n]: what the last call saw, where that
    gave the context itself (noisy context, full schedule); else the prediction, noised to `time`."""
    if result.keys_values is not None:
        return result.exit.x, result.exit.t
    x0 = result.x0.detach()
    t = torch.full_like(x0[:, 0, 0, 0, 0], time)
    return condition_first_frame(x0 if time == 0 else add_noise(x0, noise, t), t, condition.image)


def replay(network: nn.Module, exits: Sequence[ExitStep], text: Tensor | Prompt) -> Iterator[Tensor]:
    """The exit predictions x0 of a rollout again, one chunk after the other, with a graph.

    One graph is alive at a time if the caller backpropagates each before asking for the next. Under DDP or FSDP all but
    the last backward belong under `no_sync`. Valid while weights and randomness inside the network (dropout) are as
    they were.
    """
    for step in exits:
        yield step.predict(network, text).x0


def replayed_backward(network: nn.Module, exits: Sequence[ExitStep], text: Tensor | Prompt, grad: Tensor) -> None:
    """Accumulate the parameter gradients of a loss of a video, chunk by chunk in the memory of one.

    The gradient is that of the single graph of `rollout`: sum over chunks of (d x0_i / d theta)^T grad_i.

    Args:
        network: a `CausalWan` or its wrapper.
        exits: `Rollout.exits`.
        text: as in the rollout.
        grad: [B, C, F, h, w], derivative of the loss by `Rollout.video`.

    Raises:
        ValueError: the gradient has other frames than the exits.
    """
    lengths = [step.x.shape[2] for step in exits]
    if grad.shape[2] != sum(lengths):
        raise ValueError(f"the exits have {sum(lengths)} frames, the gradient {grad.shape[2]}")
    for x0, part in zip(replay(network, exits, text), grad.split(lengths, dim=2), strict=True):
        torch.autograd.backward(x0, part.to(x0))
