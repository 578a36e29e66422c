"""A video that is generated while it is watched: chunk after chunk, with prompts and actions that change on the way.

The state is one immutable value, so a snapshot costs nothing, a session can branch, and whatever fails leaves it as it
was. The call that turns a finished chunk into context is made when the next chunk is asked for: it is not on the way to
the screen.

Legend: B batch, C channels, n latent frames of a chunk, h x w latent pixels, T pixel frames, N text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache, recache
from fewstep.causal_video.denoise import ChunkNoise, ChunkResult, VideoCondition, denoise_chunk, exit_at
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.rollout import context_of, context_time, shown_of
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.state import (
    MODES,
    ChunkOutput,
    ChunkSeconds,
    KeptChunk,
    PendingChunk,
    PromptMode,
    PromptSwitch,
    StreamState,
    check_state,
    fingerprint,
)
from fewstep.causal_video.vae_stream import START, VaeState, decode_stream


@dataclass(frozen=True, eq=False)
class Draft:
    """A chunk that was generated and not shown.

    Attributes:
        state: after it, the history of the decoder apart.
        cut: whether the decoder starts over with it.
        context: seconds of the context call before it.
        denoise: seconds of its own calls.
    """

    state: StreamState
    cut: bool
    context: float
    denoise: float

    @property
    def latents(self) -> Tensor:
        """[B, C, n, h, w]."""
        assert self.state.pending is not None
        return self.state.pending.result.x0


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
        caption: what the text was encoded from, for people.

    Raises:
        ValueError: the text is not [B, N, width] of this network, the image no latent of the noise's size, or the
            settings are for another second time than the network has.
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
        caption: str = "",
    ) -> None:
        self.network = network
        self.vae = vae
        if settings.second_time not in ("none", network.second_time):
            raise ValueError(
                f"the settings say second_time {settings.second_time!r}, and the network has {network.second_time!r}"
            )
        # Settings that do not say it mean the network's; not all policies are for networks of two times.
        settings = replace(settings, second_time=network.second_time)
        check_text(network, text, len(noise.indices))
        channels, height, width = noise.size
        if image is not None and tuple(image.shape) != (len(noise.indices), channels, 1, height, width):
            raise ValueError(
                f"the latent of an image must be {[len(noise.indices), channels, 1, height, width]}, got "
                f"{list(image.shape)}"
            )
        self._state = StreamState(
            chunk=0,
            cache=RollingCache.empty(settings.layout, settings.policy),
            pending=None,
            kept=(),
            condition=VideoCondition(network.prompt(text), image),
            vae=START,
            caption=caption,
            switches=(),
            noise=noise,
            settings=settings,
            model=fingerprint(network),
        )

    @property
    def settings(self) -> CausalSettings:
        """Layout, policy and schedule of the stream."""
        return self._state.settings

    def snapshot(self) -> StreamState:
        """The state as it is now; going on does not change it. `files` writes it to a file."""
        return self._state

    def restore(self, state: StreamState) -> None:
        """Go on from a snapshot of this session, or of one with the same network and settings, to the last bit.

        Raises:
            ValueError: the snapshot is of another model or other settings, or lacks the history of the decoder.
        """
        check_state(state, settings=self.settings, model=self._state.model, decodes=self.vae is not None)
        self._state = state

    def stream(
        self, chunks: int, actions: Sequence[Tensor] | None = None, *, pipelined: bool = False
    ) -> Iterator[ChunkOutput]:
        """`step` for a number of chunks, one at a time as the caller takes them.

        Args:
            chunks: how many.
            actions: conditioning channels of each, see `step`.
            pipelined: generate the next chunk in a thread while this one is decoded and shown. The frames are the same;
                a prompt or snapshot that is set in between makes the chunk in the works worthless, and it is made anew.

        Raises:
            ValueError: not one action per chunk.
        """
        if actions is not None and len(actions) != chunks:
            raise ValueError(f"{chunks} chunks need as many actions, got {len(actions)}")
        listed = [None] * chunks if actions is None else list(actions)
        if pipelined:
            yield from self._pipelined(listed)
            return
        for action in listed:
            yield self.step(action)

    @torch.no_grad()
    def step(self, action: Tensor | None = None) -> ChunkOutput:
        """Generate the next chunk.

        Args:
            action: conditioning channels [B, Ce, n, h, w] of its frames, for networks that take some.

        Raises:
            ValueError: the action is not what the network takes, or the chunk is not finite. The session stays as it
                was, and the step can be made again.
        """
        return self._show(self._generate(self._state, action))

    @torch.no_grad()
    def feed(self, latents: Tensor, action: Tensor | None = None) -> ChunkOutput:
        """Take a given chunk in place of a generated one: the beginning of a video that is to go on.

        Args:
            latents: clean [B, C, n, h, w]; n is the length of the next chunk.
            action: as in `step`.

        Raises:
            ValueError: another shape.
        """
        began = self._clock()
        state, cut = self._ready(self._state)
        ready = self._clock()
        local = state.cache.next_chunk
        channels, height, width = state.noise.size
        expected = (len(state.noise.indices), channels, self.settings.layout.length(local), height, width)
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"chunk {local} has {expected[2]} latent frames, got {latents.shape[2] if latents.ndim == 5 else 0} in "
                f"latents {list(latents.shape)}; they must be {list(expected)}: cut the video as the layout does"
            )
        check_action(self.network, action, expected)
        condition = VideoCondition(state.condition.text, None, action)
        exit_step = exit_at(latents, 0.0, condition, state.cache.read())
        draft = self._drafted(state, ChunkResult(exit_step.x, exit_step, None), condition, cut=cut)
        return self._show(replace(draft, context=ready - began, denoise=self._clock() - ready))

    @torch.no_grad()
    def set_prompt(
        self, text: Tensor, mode: PromptMode = "recache", *, at_chunk: int | None = None, caption: str = ""
    ) -> None:
        """Change the text from a chunk on. What was shown before becomes context under the old text first.

        Args:
            text: embeddings [B, N, width].
            mode: "recache" computes the stored keys and values again under the new text, the sink excepted (LongLive,
                arXiv:2509.22622); "cross_only" leaves them (Reward Forcing, arXiv:2512.04678); "hard" forgets them: a
                cut, after which the layout, the schedule and the decoder start over.
            at_chunk: the first chunk of the new text; None is the next one.
            caption: what the text was encoded from.

        Raises:
            ValueError: an unknown mode, a text of another shape, or a chunk that was shown already.
        """
        state = self._state
        if mode not in MODES:
            raise ValueError(f"mode must be recache, cross_only or hard, got {mode!r}")
        at_chunk = state.chunk if at_chunk is None else at_chunk
        if at_chunk < state.chunk:
            raise ValueError(
                f"chunk {at_chunk} is past: chunks up to {state.chunk - 1} were shown. Switch at chunk {state.chunk} "
                "or later, or restore a snapshot from before"
            )
        check_text(self.network, text, len(state.noise.indices))
        switch = PromptSwitch(at_chunk, self.network.prompt(text), mode, caption)
        # A stable sort: of several switches at one chunk the last one has the last word.
        switches = tuple(sorted((*state.switches, switch), key=lambda planned: planned.chunk))
        self._state = replace(state, switches=switches)

    @torch.no_grad()
    def _generate(self, state: StreamState, action: Tensor | None) -> Draft:
        """The chunk after `state`; the session is not changed."""
        began = self._clock()
        state, cut = self._ready(state)
        ready = self._clock()
        local = state.cache.next_chunk
        frames, times = state.settings.layout.length(local), state.settings.schedule.of(local)
        channels, height, width = state.noise.size
        check_action(self.network, action, (len(state.noise.indices), channels, frames, height, width))
        image = state.condition.image if local == 0 else None
        if image is not None and frames == 1:
            # The frame is given: one call says all that later chunks see of it.
            times = times[-1:]
        condition = VideoCondition(state.condition.text, image, action)
        result = denoise_chunk(
            self.network,
            [state.noise.draw(state.chunk, step, frames, state.prompt.tokens) for step in range(len(times))],
            times,
            condition,
            state.cache.read(),
            collect=state.settings.policy.is_noisy(local),
        )
        if not bool(result.x0.isfinite().all()):
            raise ValueError(
                f"chunk {state.chunk} is not finite: the network overflows on this input. Use a wider dtype, or "
                "restore a snapshot from before"
            )
        draft = self._drafted(state, result, condition, cut=cut)
        return replace(draft, context=ready - began, denoise=self._clock() - ready)

    def _ready(self, state: StreamState) -> tuple[StreamState, bool]:
        """The state with the last chunk as context and the prompts that are due; whether one of them is a cut."""
        state = self._committed(state)
        due = [switch for switch in state.switches if switch.chunk <= state.chunk]
        for switch in due:
            state = self._switched(state, switch)
        left = tuple(switch for switch in state.switches if switch.chunk > state.chunk)
        return replace(state, switches=left), any(switch.mode == "hard" for switch in due)

    def _committed(self, state: StreamState) -> StreamState:
        """The state with the last chunk as context."""
        pending = state.pending
        if pending is None:
            return state
        local, settings = state.cache.next_chunk, state.settings
        frames = settings.layout.length(local)
        fresh = state.noise.draw(pending.number, len(settings.schedule.of(local)), frames, pending.result.x0)
        time = context_time(settings, local)
        context = context_of(self.network, pending.result, pending.condition, time, fresh)
        cache = state.cache.commit(context)
        stored = {entry.segment.chunk for entry in cache.entries}
        shown, times = shown_of(pending.result, pending.condition, time, fresh)
        kept = (*state.kept, KeptChunk(local, shown, times, pending.condition.extra))
        return replace(state, cache=cache, kept=tuple(k for k in kept if k.chunk in stored), pending=None)

    def _switched(self, state: StreamState, switch: PromptSwitch) -> StreamState:
        """The state under another prompt; nothing is pending."""
        cache, kept, image = state.cache, state.kept, state.condition.image
        if switch.mode == "hard":
            cache, kept, image = RollingCache.empty(state.settings.layout, state.settings.policy), (), None
        elif switch.mode == "recache" and len(kept) > 0:
            extras = [k.extra for k in kept if k.extra is not None]
            cache = recache(
                self.network,
                cache,
                [k.shown for k in kept],
                switch.prompt,
                extras=extras if len(extras) == len(kept) else None,
                times=[k.times for k in kept],
            )
        condition = VideoCondition(switch.prompt, image)
        return replace(state, cache=cache, kept=kept, condition=condition, caption=switch.caption)

    def _drafted(self, state: StreamState, result: ChunkResult, condition: VideoCondition, *, cut: bool) -> Draft:
        pending = PendingChunk(result, condition, state.chunk)
        return Draft(replace(state, chunk=state.chunk + 1, pending=pending), cut, 0.0, 0.0)

    def _show(self, draft: Draft) -> ChunkOutput:
        """Decode a chunk and make its state the session's."""
        began = self._clock()
        frames, vae_state = None, self._state.vae
        if self.vae is not None:
            frames, vae_state = self._decoded(draft.latents, START if draft.cut else vae_state)
        seconds = ChunkSeconds(draft.context, draft.denoise, self._clock() - began)
        self._state = replace(draft.state, vae=vae_state)
        return ChunkOutput(draft.state.chunk - 1, draft.latents, frames, seconds)

    @torch.no_grad()
    def _decoded(self, latents: Tensor, state: VaeState) -> tuple[Tensor, VaeState]:
        assert self.vae is not None
        return decode_stream(self.vae, latents, state)

    def _pipelined(self, actions: Sequence[Tensor | None]) -> Iterator[ChunkOutput]:
        """Decode and show a chunk while the next one is generated in a thread, on a CUDA stream of its own."""
        side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        shown: StreamState | None = None
        ahead: Future[Draft] | None = None
        with ThreadPoolExecutor(1) as worker:

            def generate(state: StreamState, action: Tensor | None) -> Draft:
                with nullcontext() if side is None else torch.cuda.stream(side):
                    return self._generate(state, action)

            for index, action in enumerate(actions):
                if ahead is None or self._state is not shown:  # The caller changed what comes next.
                    self._await(side)
                    ahead = worker.submit(generate, self._state, action)
                draft = ahead.result()
                if index + 1 < len(actions):
                    self._await(side)
                    ahead = worker.submit(generate, draft.state, actions[index + 1])
                output = self._show(draft)
                shown = self._state
                yield output

    def _await(self, side: torch.cuda.Stream | None) -> None:
        """Let the other stream begin after what this one was given."""
        if side is not None:
            side.wait_stream(torch.cuda.current_stream(self._device))

    @property
    def _device(self) -> torch.device:
        return self.network.transformer.device

    def _clock(self) -> float:
        """Seconds, once the device has done what this thread gave it."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()


def check_text(network: CausalWan, text: Tensor, batch: int) -> None:
    """Raise ValueError unless embeddings are [batch, N, width] of a network."""
    width = network.transformer.config["text_dim"]
    if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != width:
        raise ValueError(f"text must be embeddings [{batch}, N, {width}], got {list(text.shape)}")


def check_action(network: CausalWan, action: Tensor | None, latents: tuple[int, int, int, int, int]) -> None:
    """Raise ValueError unless conditioning channels are those a network takes beside latents of this shape."""
    expected = (latents[0], network.extra_channels, *latents[2:])
    given = 0 if action is None else list(action.shape)
    if (network.extra_channels == 0 and action is not None) or (given != list(expected) and network.extra_channels > 0):
        raise ValueError(
            f"the network takes {network.extra_channels} conditioning channels beside its latents, so an action is "
            f"{list(expected) if network.extra_channels else 'None'}, got {given or None}"
        )
