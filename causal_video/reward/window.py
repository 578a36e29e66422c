"""A window of a stream in Astrolabe's loop: what lies before it, the candidates in it, and what is minimised on them.

A prompt's stream is generated once up to the window. Its cache is then a constant that all candidates of the prompt go
on from, each with noise of its own. Their clean latents are noised anew, and student, older policy and reference are
called on each chunk with exactly the keys and values that the older policy saw when it made the candidate: those of the
stream before the window, and of the candidate's own earlier chunks. One stored context for all three has two reasons.
It is the deployed one, with its sink, evictions, noisy context and quantised numbers, which no packed mask expresses;
and what the networks then differ in is their prediction alone. No gradient enters it.

Legend: G prompts of a slice with K candidates each, n = G K; C channels, F latent frames and T pixel frames of the
window; latents [n, C, F, h, w], pixels [n, 3, T, H, W] in [0, 1]; N samples of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fewstep.causal_video.cache.quantised import QuantisedKeysValues, QuantisedTensor
from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise, ExitStep, VideoCondition
from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.model.prefix import KeysValues, StoredKeysValues
from fewstep.causal_video.reward.astrolabe import selective_penalty
from fewstep.causal_video.reward.config import CausalRewardConfig
from fewstep.causal_video.reward.setup import CausalRewardSetup
from fewstep.causal_video.rollout import Rollout, rollout
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.vae_stream import START, VaeState, decode_stream
from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw, shared_integer
from fewstep.dmd.reward.groups import SampleGroups, group_samples
from fewstep.dmd.reward.methods.nft import nft_loss


@dataclass(frozen=True)
class WindowPlan:
    """The chunks start ... start + chunks - 1 of a stream."""

    start: int
    chunks: int


def plan_window(config: CausalRewardConfig, step: int) -> WindowPlan:
    """The window of a step: anywhere in the longest stream, a function of (seed, step), the same on all processes."""
    chunks = config.section.chunks
    places = config.longest_chunks - chunks + 1
    return WindowPlan(shared_integer(config.run.seed, step, "reward_window", places), chunks)


@dataclass(frozen=True, eq=False)
class StreamPoint:
    """A stream at the end of a chunk: what later chunks see of it, and the history of the decoder."""

    cache: RollingCache
    decoder: VaeState = START


def full_rollout(
    network: CausalWan,
    text: Prompt,
    noise: ChunkNoise,
    settings: CausalSettings,
    *,
    cache: RollingCache,
    chunks: int,
) -> Rollout:
    """The next chunks of a stream at all steps of their schedule, as in deployment."""
    exits = settings.schedule.exits(settings.schedule.longest - 1, chunks, first=cache.next_chunk)
    return rollout(network, VideoCondition(text), noise, settings, exits=exits, cache=cache)


@torch.no_grad()
def stream_to(
    network: CausalWan,
    vae: AutoencoderKLWan,
    tokens: Tensor,
    noise: ChunkNoise,
    settings: CausalSettings,
    *,
    chunks: int,
) -> StreamPoint:
    """The first `chunks` chunks of a stream; frames are forgotten as soon as the decoder has seen them."""
    point, text = StreamPoint(RollingCache.empty(settings.layout, settings.policy)), network.prompt(tokens)
    for _ in range(chunks):
        done = full_rollout(network, text, noise, settings, cache=point.cache, chunks=1)
        point = StreamPoint(done.cache, decode_stream(vae, done.video, point.decoder)[1])
    return point


def branched(point: StreamPoint, copies: int) -> StreamPoint:
    """The same point `copies` times for each row: [G, ...] becomes [G copies, ...], copies of a row side by side."""
    contents = [_repeated(entry.content, copies) for entry in point.cache.entries]
    features = [
        value.repeat_interleave(copies, dim=0) if isinstance(value, Tensor) else value
        for value in point.decoder.features
    ]
    return StreamPoint(point.cache.with_contents(contents), replace(point.decoder, features=tuple(features)))


def _repeated(content: StoredKeysValues, copies: int) -> StoredKeysValues:
    """Stored tensors are [L, B, H, N, d]."""
    if isinstance(content, KeysValues):
        return KeysValues(*(value.repeat_interleave(copies, dim=1) for value in (content.keys, content.values)))
    assert isinstance(content, QuantisedKeysValues)
    keys, values = (
        QuantisedTensor(part.numbers.repeat_interleave(copies, dim=1), part.scales.repeat_interleave(copies, dim=1))
        for part in (content.keys, content.values)
    )
    return QuantisedKeysValues(keys, values, content.dtype)


@dataclass(frozen=True, eq=False)
class Window:
    """Candidates in a window, without graph.

    Attributes:
        tokens: text embeddings [n, N, width].
        latents: see above.
        calls: the last call of each chunk; its prefix is what the chunk saw.
        pixels: of the window's frames, decoded with what was before them.
        after: where the streams are at the end.
    """

    tokens: Tensor
    latents: Tensor
    calls: tuple[ExitStep, ...]
    pixels: Tensor
    after: StreamPoint


@torch.no_grad()
def draw_window(
    network: CausalWan,
    vae: AutoencoderKLWan,
    tokens: Tensor,
    settings: CausalSettings,
    plan: WindowPlan,
    *,
    before: ChunkNoise,
    inside: ChunkNoise,
) -> Window:
    """Stream each prompt to the window once, and go on from there once for each candidate.

    Args:
        network: the policy.
        vae: decodes.
        tokens: text embeddings [G, N, width], a row per prompt.
        settings: layout, policy and schedule.
        plan: the window.
        before: noise of the G streams before the window.
        inside: noise of the n candidates.
    """
    copies = len(inside.indices) // len(tokens)
    point = branched(stream_to(network, vae, tokens, before, settings, chunks=plan.start), copies)
    repeated = tokens.repeat_interleave(copies, dim=0)
    done = full_rollout(network, network.prompt(repeated), inside, settings, cache=point.cache, chunks=plan.chunks)
    pixels, decoder = decode_stream(vae, done.video, point.decoder)
    return Window(repeated, done.video, done.exits, pixels, StreamPoint(done.cache, decoder))


@dataclass(frozen=True, eq=False)
class Candidates:
    """One slice of a step: whole groups of candidates of the older policy."""

    draw: Draw
    plan: WindowPlan
    groups: SampleGroups
    prompts: list[str]
    window: Window


def draw_candidates(
    config: CausalRewardConfig, setup: CausalRewardSetup, indices: Sequence[int], plan: WindowPlan
) -> Candidates:
    """Candidates with these sample numbers. Before the window noise is that of a group, inside it that of a sample."""
    size, seed, causal = config.reward.group_size, config.run.seed, setup.causal
    groups = group_samples(indices, size, prompts=len(causal.prompts), seed=seed)
    channels, _, height, width = causal.latent_shape
    frame = (channels, height, width)
    numbers = tuple(groups.groups[::size].tolist())
    window = draw_window(
        setup.old,
        setup.vae,
        causal.prompts.rows(groups.rows[::size]).text,
        causal.settings,
        plan,
        before=ChunkNoise(seed, numbers, frame, stream="reward before"),
        inside=ChunkNoise(seed, tuple(indices), frame, stream="reward"),
    )
    prompts = [causal.prompts.prompts[row] for row in groups.rows]
    return Candidates(Draw(seed, list(indices), setup.device), plan, groups, prompts, window)


@dataclass(frozen=True, eq=False)
class ChunkStep:
    """What the loss on one chunk needs beside the student's prediction.

    Attributes:
        call: on the noised chunk, at a time of the student's own.
        x0: [n, C, f, h, w] the candidate's chunk.
        old_x0: what the older policy predicts at the call.
        reference_x0: what the reference predicts there, or None.
        share: of the chunk in the window's frames.
    """

    call: ExitStep
    x0: Tensor
    old_x0: Tensor
    reference_x0: Tensor | None
    share: float


@torch.no_grad()
def prepare(setup: CausalRewardSetup, candidates: Candidates) -> tuple[ChunkStep, ...]:
    """Noise the candidates anew and call older policy and reference on them; no reward enters.

    Each candidate draws one place in the schedule, and every chunk takes its own time there: the warped times that the
    student is called at, and no others, since between them it is no flow.
    """
    draw, window, settings = candidates.draw, candidates.window, setup.causal.settings
    u = draw.uniform("reward_time")
    noises = draw.noise(tuple(window.latents.shape[1:]), "reward_noise")
    lengths = [call.x.shape[2] for call in window.calls]
    parts = zip(window.latents.split(lengths, dim=2), noises.split(lengths, dim=2), strict=True)
    old_text = setup.old.prompt(window.tokens)
    reference_text = None if setup.reference is None else setup.reference.prompt(window.tokens)
    steps = []
    for number, (x0, noise) in enumerate(parts):
        times = torch.tensor(settings.schedule.of(candidates.plan.start + number), device=u.device)
        t = times[(u * len(times)).long().clamp(max=len(times) - 1)]
        x_t = add_noise(x0, noise, t)
        call = replace(window.calls[number], x=x_t, t=t[:, None].expand(-1, lengths[number]))
        reference_x0 = None
        if setup.reference is not None and reference_text is not None:
            reference_x0 = call.predict(setup.reference, reference_text).x0
        old_x0 = call.predict(setup.old, old_text).x0
        steps.append(ChunkStep(call, x0, old_x0, reference_x0, lengths[number] / sum(lengths)))
    return tuple(steps)


@dataclass(frozen=True, eq=False)
class ChunkLoss:
    """The parts of a window's loss that come from one chunk, 0-dim; their sums over chunks are those of the window."""

    policy: Tensor
    penalty: Tensor


def chunk_loss(
    step: ChunkStep, prediction: Tensor, probability: Tensor, risky: Tensor, *, nft_beta: float
) -> ChunkLoss:
    """Policy loss and selective penalty of the student's x0 prediction on one chunk (Astrolabe, arXiv:2603.17051).

    Both are means over the numbers of a candidate, so the loss of the window is the sum over its chunks, and so is its
    gradient: one chunk's graph is alive at a time.

    Args:
        step: see there.
        prediction: [n, C, f, h, w], with graph.
        probability: [n] r in [0, 1].
        risky: [n] bool, the candidates that are held back.
        nft_beta: strength of the interpolation.

    Raises:
        ValueError: as `nft_loss` and `selective_penalty`.
    """
    policy = nft_loss(prediction, step.old_x0, step.x0, probability, nft_beta=nft_beta)
    penalty = torch.zeros_like(policy)
    if step.reference_x0 is not None:
        penalty = selective_penalty(prediction, step.reference_x0, risky)
    return ChunkLoss(step.share * policy, step.share * penalty)
