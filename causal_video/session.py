"""A video that is generated while it is watched: chunk after chunk, with prompts and actions that change on the way.

The state is one immutable value, so a snapshot costs nothing and a session can branch. The call that turns a finished
chunk into context is made when the next chunk is asked for: it is not on the way to the screen.

Legend: B batch, C channels, n latent frames of a chunk, h x w latent pixels, T pixel frames, N text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fewstep.causal_video.block import Prompt
from fewstep.causal_video.cache import RollingCache, recache
from fewstep.causal_video.denoise import ChunkNoise, ChunkResult, VideoCondition, denoise_chunk, exit_at
from fewstep.causal_video.network import CausalWan
from fewstep.causal_video.rollout import context_of, context_time
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.vae_stream import START, VaeState, decode_stream

PromptMode = Literal["recache", "cross_only", "hard"]


@dataclass(frozen=True)
class ChunkSeconds:
    """Where the time of a chunk went: the context call of the chunk before, its own calls, its decoding."""

    context: float
    denoise: float
    decode: float


@dataclass(frozen=True, eq=False)
class ChunkOutput:
    """A finished chunk.

    Attributes:
        chunk: its number in the session.
        latents: [B, C, n, h, w].
        frames: [B, 3, T, H, W] in [0, 1], or None without a VAE.
        seconds: see `ChunkSeconds`.
    """

    chunk: int
    latents: Tensor
    frames: Tensor | None
    seconds: ChunkSeconds


@dataclass(frozen=True, eq=False)
class KeptChunk:
    """A chunk that may have to be computed again, by its number in the cache."""

    chunk: int
    x0: Tensor
    extra: Tensor | None


@dataclass(frozen=True, eq=False)
class PendingChunk:
    """A chunk that was shown and is not context yet."""

    result: ChunkResult
    condition: VideoCondition
    number: int


@dataclass(frozen=True, eq=False)
class StreamState:
    """Everything a session is, beside network, VAE and settings; to be stored and restored as it is.

    Attributes:
        chunk: chunks that were shown.
        cache: of the chunks before the pending one.
        pending: the last chunk, until the next one is asked for.
        kept: latents of the stored segments, for a change of the prompt.
        condition: the prompt, and the image of the first frame.
        vae: history of the decoder.
    """

    chunk: int
    cache: RollingCache
    pending: PendingChunk | None
    kept: tuple[KeptChunk, ...]
    condition: VideoCondition
    vae: VaeState


class StreamSession:
    """One stream of a causal video student.

    Chunk for chunk it gives what `rollout` gives without gradients at full schedules, whoever asks for how many.

    Args:
        network: the student, in eval mode.
        text: embeddings [B, N, width].
        noise: of the stream.
        settings: layout (its last length repeats for ever), policy and schedule.
        vae: decodes chunks; None leaves latents.
        image: latent [B, C, 1, h, w] of a given first frame (`vae_stream.encode_stream`).
    """

    def __init__(
        self,
        network: CausalWan,
        text: Tensor,
        noise: ChunkNoise,
        settings: CausalSettings,
        *,
        vae: AutoencoderKLWan | None = None,
        image: Tensor | None = None,
    ) -> None:
        self.network = network
        self.noise = noise
        self.settings = settings
        self.vae = vae
        cache = RollingCache.empty(settings.layout, settings.policy)
        condition = VideoCondition(network.prompt(text), image)
        self._state = StreamState(0, cache, None, (), condition, START)

    def snapshot(self) -> StreamState:
        """The state as it is now; going on does not change it."""
        return self._state

    def restore(self, state: StreamState) -> None:
        """Go on from a snapshot of this session, or of one with the same network and settings.

        Raises:
            ValueError: the snapshot has another layout or policy.
        """
        if (state.cache.plan.layout, state.cache.plan.policy) != (self.settings.layout, self.settings.policy):
            raise ValueError("the snapshot was taken under another layout or policy than this session has")
        self._state = state

    def stream(self, chunks: int, actions: Sequence[Tensor] | None = None) -> Iterator[ChunkOutput]:
        """`step` for a number of chunks, one at a time as the caller takes them.

        Args:
            chunks: how many.
            actions: conditioning channels of each, see `step`.

        Raises:
            ValueError: not one action per chunk.
        """
        if actions is not None and len(actions) != chunks:
            raise ValueError(f"{chunks} chunks need as many actions, got {len(actions)}")
        for index in range(chunks):
            yield self.step(None if actions is None else actions[index])

    @torch.no_grad()
    def step(self, action: Tensor | None = None) -> ChunkOutput:
        """Generate the next chunk.

        Args:
            action: conditioning channels [B, Ce, n, h, w] of its frames, for networks that take some.
        """
        began = self._clock()
        self._commit_pending()
        ready = self._clock()
        state, local = self._state, self._state.cache.next_chunk
        frames, times = self.settings.layout.length(local), self.settings.schedule.of(local)
        condition = VideoCondition(state.condition.text, state.condition.image if local == 0 else None, action)
        result = denoise_chunk(
            self.network,
            [self.noise.draw(state.chunk, step, frames, self._text.tokens) for step in range(len(times))],
            times,
            condition,
            state.cache.read(),
            collect=self.settings.policy.is_noisy(local),
        )
        return self._finish(result, condition, began, ready)

    @torch.no_grad()
    def feed(self, latents: Tensor, action: Tensor | None = None) -> ChunkOutput:
        """Take a given chunk in place of a generated one: the beginning of a video that is to go on.

        Args:
            latents: clean [B, C, n, h, w]; n is the length of the next chunk.
            action: as in `step`.

        Raises:
            ValueError: another number of frames.
        """
        began = self._clock()
        self._commit_pending()
        ready = self._clock()
        state, local = self._state, self._state.cache.next_chunk
        if latents.shape[2] != self.settings.layout.length(local):
            raise ValueError(
                f"chunk {local} has {self.settings.layout.length(local)} latent frames, got {latents.shape[2]}: cut "
                "the video as the layout does"
            )
        condition = VideoCondition(state.condition.text, None, action)
        exit_step = exit_at(latents, 0.0, condition, state.cache.read())
        return self._finish(ChunkResult(exit_step.x, exit_step, None), condition, began, ready)

    @torch.no_grad()
    def set_prompt(self, text: Tensor, mode: PromptMode = "recache") -> None:
        """Change the text from the next chunk on. What was shown becomes context under the old text first.

        Args:
            text: embeddings [B, N, width].
            mode: "recache" computes the stored keys and values again under the new text, the sink excepted (LongLive,
                arXiv:2509.22622); "cross_only" leaves them (Reward Forcing, arXiv:2512.04678); "hard" forgets them: a
                cut, after which the layout, the schedule and the decoder start over.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in ("recache", "cross_only", "hard"):
            raise ValueError(f"mode must be recache, cross_only or hard, got {mode!r}")
        self._commit_pending()
        state, prompt = self._state, self.network.prompt(text)
        cache, kept, vae = state.cache, state.kept, state.vae
        if mode == "hard":
            cache, kept, vae = RollingCache.empty(self.settings.layout, self.settings.policy), (), START
        elif mode == "recache" and len(kept) > 0:
            extras = [k.extra for k in kept if k.extra is not None]
            latents = [k.x0 for k in kept]
            cache = recache(self.network, cache, latents, prompt, extras=extras if len(extras) == len(kept) else None)
        image = state.condition.image if mode != "hard" else None
        self._state = replace(state, cache=cache, kept=kept, vae=vae, condition=VideoCondition(prompt, image))

    @property
    def _text(self) -> Prompt:
        text = self._state.condition.text
        assert isinstance(text, Prompt)
        return text

    def _commit_pending(self) -> None:
        """Turn the last chunk into context."""
        state, pending = self._state, self._state.pending
        if pending is None:
            return
        local = state.cache.next_chunk
        frames = self.settings.layout.length(local)
        fresh = self.noise.draw(pending.number, len(self.settings.schedule.of(local)), frames, pending.result.x0)
        time_of_context = context_time(self.settings, local)
        context = context_of(self.network, pending.result, pending.condition, time_of_context, fresh)
        cache = state.cache.commit(context)
        stored = {entry.segment.chunk for entry in cache.entries}
        kept = (*state.kept, KeptChunk(local, pending.result.x0, pending.condition.extra))
        kept = tuple(k for k in kept if k.chunk in stored)
        self._state = replace(state, cache=cache, kept=kept, pending=None)

    def _finish(self, result: ChunkResult, condition: VideoCondition, began: float, ready: float) -> ChunkOutput:
        state = self._state
        denoised = self._clock()
        frames, vae_state = None, state.vae
        if self.vae is not None:
            frames, vae_state = decode_stream(self.vae, result.x0, state.vae)
        seconds = ChunkSeconds(ready - began, denoised - ready, self._clock() - denoised)
        pending = PendingChunk(result, condition, state.chunk)
        self._state = replace(state, chunk=state.chunk + 1, pending=pending, vae=vae_state)
        return ChunkOutput(state.chunk, result.x0, frames, seconds)

    def _clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.network.transformer.device.type == "cuda":
            torch.cuda.synchronize(self.network.transformer.device)
        return time.perf_counter()
