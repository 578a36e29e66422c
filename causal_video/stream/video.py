"""A stream as a user has it: prompts are text, actions are words, clips are pixels.

Legend: B batch, C channels, n latent frames of a chunk, h x w latent pixels, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from fewstep.causal_video.layout import TEMPORAL_STRIDE, ChunkLayout
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.stream.files import load_state, save_state
from fewstep.causal_video.stream.session import StreamSession
from fewstep.causal_video.stream.state import ChunkOutput, PromptMode, StreamState
from fewstep.causal_video.stream.world import ActionSpace
from fewstep.causal_video.vae_stream import encode_stream
from fewstep.core.families.wan import WanFamily

# Conditioning channels [B, Ce, n, h, w], the name of an action that is held, or one name per pixel frame.
Action: TypeAlias = Tensor | str | Sequence[str]


@dataclass(frozen=True)
class PromptEncoder:
    """Embeddings of prompts as the student was trained with."""

    pipeline: WanPipeline
    family: WanFamily

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, N, width]."""
        return self.family.encode_prompts(self.pipeline, list(prompts)).text


class VideoSession:
    """One stream, opened by `CausalVideoPipeline.open`; see `StreamSession` for what each method does to the video.

    Args:
        session: the stream on embeddings.
        text: how prompts are encoded.
        vae: encodes clips that are fed.
        actions: names of actions, for a network that is steered by words.
    """

    def __init__(
        self, session: StreamSession, text: PromptEncoder, vae: AutoencoderKLWan, actions: ActionSpace | None = None
    ) -> None:
        self._session = session
        self._text = text
        self._vae = vae
        self._actions = actions

    @property
    def chunk(self) -> int:
        """The number of the next chunk."""
        return self._session.snapshot().chunk

    @property
    def prompt(self) -> str:
        """The text of the last chunk; a line each in a batch."""
        return self._session.snapshot().caption

    @property
    def settings(self) -> CausalSettings:
        """Layout, policy and schedule."""
        return self._session.settings

    def stream(
        self, chunks: int, actions: Sequence[Action] | None = None, *, pipelined: bool = False
    ) -> Iterator[ChunkOutput]:
        """The next chunks, one at a time as the caller takes them; `pipelined` as in `StreamSession.stream`.

        Raises:
            ValueError: not one action per chunk, or see `step`.
        """
        if actions is None:
            return self._session.stream(chunks, pipelined=pipelined)
        if len(actions) != chunks:
            raise ValueError(f"{chunks} chunks need as many actions, got {len(actions)}")
        if not pipelined:
            # One by one, for a cut on the way changes the lengths of chunks.
            return map(self.step, actions)
        encoded = [self._channels(action, self.chunk + index) for index, action in enumerate(actions)]
        return self._session.stream(chunks, encoded, pipelined=True)

    def step(self, action: Action | None = None) -> ChunkOutput:
        """Generate the next chunk.

        Args:
            action: the name of an action, a name per pixel frame of the chunk, or conditioning channels
                [B, Ce, n, h, w]; for steered networks, and needed there.

        Raises:
            ValueError: the action is not what the network takes, or see `StreamSession.step`.
        """
        return self._session.step(None if action is None else self._channels(action, self.chunk))

    def feed(self, pixels: Tensor, action: Action | None = None) -> list[ChunkOutput]:
        """Go on from a given clip: its chunks take the place of generated ones. One output per chunk.

        Args:
            pixels: [3, T, H, W] or [B, 3, T, H, W] in [0, 1], at the beginning of the session; T such that the latent
                frames, (T - 1) / 4 + 1, are whole chunks.
            action: what was held during it, for steered networks: one name, a name per pixel frame, or conditioning
                channels [B, Ce, F, h, w].

        Raises:
            ValueError: frames, sizes or actions that do not fit, or chunks were shown already.
        """
        state = self._session.snapshot()
        if state.chunk > 0:
            raise ValueError(f"a given clip is the beginning of a video, and this one is at chunk {state.chunk}")
        clip = batched(pixels, len(state.noise.indices), ndim=4)
        lengths = list(chunks_of_clip(self.settings.layout, clip.shape[2]))
        check_pixels(clip, state.noise.size, self._vae)
        latents, _ = encode_stream(self._vae, clip.to(self._vae.device))
        held = None if action is None else self._clip_channels(action, latents)
        outputs = []
        try:
            for part, channels in zip(
                latents.split(lengths, dim=2),
                [None] * len(lengths) if held is None else held.split(lengths, dim=2),
                strict=True,
            ):
                outputs.append(self._session.feed(part, channels))
        except BaseException:
            # All of the clip or nothing.
            self._session.restore(state)
            raise
        return outputs

    def set_prompt(
        self, prompt: str | Sequence[str], mode: PromptMode = "recache", *, at_chunk: int | None = None
    ) -> None:
        """Another prompt from the next chunk on, or from chunk `at_chunk`; modes as in `StreamSession.set_prompt`.

        Raises:
            ValueError: an unknown mode, a chunk that is past, or another number of prompts than samples.
        """
        batch = len(self._session.snapshot().noise.indices)
        prompts = [prompt] * batch if isinstance(prompt, str) else list(prompt)
        if len(prompts) != batch:
            raise ValueError(f"this session has {batch} samples, got {len(prompts)} prompts")
        self._session.set_prompt(self._text.encode(prompts), mode, at_chunk=at_chunk, caption=caption_of(prompts))

    def snapshot(self) -> StreamState:
        """The state as it is now, at no cost."""
        return self._session.snapshot()

    def restore(self, state: StreamState | str | Path) -> None:
        """Go on from a snapshot or a file of one, to the last bit.

        Raises:
            ValueError: it is of another model or other settings, or is no snapshot. The session stays as it was.
        """
        if not isinstance(state, StreamState):
            state = load_state(state, self._session.network)
        self._session.restore(state)

    def save(self, path: str | Path) -> Path:
        """Write the state as one safetensors file for `restore`."""
        return save_state(self.snapshot(), path)

    def _channels(self, action: Action, chunk: int) -> Tensor:
        """Conditioning channels of a chunk."""
        if isinstance(action, Tensor):
            return action
        state = self._session.snapshot()
        local = state.local_chunk(chunk)
        size = (len(state.noise.indices), self.settings.layout.length(local), *state.noise.size[1:])
        return self._named(action).channels(action, size, is_start=local == 0).to(state.prompt.tokens.device)

    def _clip_channels(self, action: Action, latents: Tensor) -> Tensor:
        """Conditioning channels of a clip [B, C, F, h, w] at the beginning."""
        if isinstance(action, Tensor):
            return action
        batch, _, frames, height, width = latents.shape
        return self._named(action).channels(action, (batch, frames, height, width), is_start=True).to(latents.device)

    def _named(self, action: Action) -> ActionSpace:
        if self._actions is None:
            raise ValueError(f"this network knows no actions by name, got {action!r}: give conditioning channels")
        return self._actions


def caption_of(prompts: Sequence[str]) -> str:
    """Prompts as one text: a line each, or one line where they are equal."""
    return "\n".join(prompts) if len(set(prompts)) > 1 else prompts[0]


def batched(pixels: Tensor, batch: int, *, ndim: int) -> Tensor:
    """Pixels with a batch axis: one of `ndim` axes is repeated. Raises ValueError for other axes or batches."""
    wide = pixels[None].expand(batch, *pixels.shape) if pixels.ndim == ndim else pixels
    if wide.ndim != ndim + 1 or wide.shape[0] != batch or wide.shape[1] != 3:
        raise ValueError(
            f"pixels must be {'[3, T, H, W]' if ndim == 4 else '[3, H, W]'} in [0, 1], or {batch} of them, got "
            f"{list(pixels.shape)}"
        )
    return wide


def check_pixels(pixels: Tensor, size: tuple[int, int, int], vae: AutoencoderKLWan) -> None:
    """Raise ValueError unless pixels [..., H, W] are of the size of a stream, (C, h, w)."""
    factor = vae.config["scale_factor_spatial"]
    expected = (size[1] * factor, size[2] * factor)
    if tuple(pixels.shape[-2:]) != expected:
        raise ValueError(f"the stream has {expected[0]} x {expected[1]} pixels, got {list(pixels.shape[-2:])}: resize")


def chunks_of_clip(layout: ChunkLayout, pixel_frames: int) -> tuple[int, ...]:
    """Latent frames of the chunks that a clip at the beginning fills.

    Raises:
        ValueError: the frames are not 1 + 4 k, or end within a chunk.
    """
    latent, rest = divmod(pixel_frames - 1, TEMPORAL_STRIDE)
    chunk = 0
    while layout.end(chunk) < latent + 1:
        chunk += 1
    if pixel_frames < 1 or rest or layout.end(chunk) != latent + 1:
        fitting = [TEMPORAL_STRIDE * (layout.end(c) - 1) + 1 for c in (max(0, chunk - 1), chunk, chunk + 1)]
        raise ValueError(
            f"{pixel_frames} pixel frames do not fit the layout {list(layout.lengths)}: clips that end with a chunk "
            f"have {', '.join(map(str, sorted(set(fitting))))} frames around there"
        )
    return tuple(layout.length(c) for c in range(chunk + 1))
