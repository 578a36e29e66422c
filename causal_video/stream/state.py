"""What a stream is at one moment, as values: sessions compute the next value and never change an old one.

Legend: B batch, C channels, n latent frames of a chunk, h x w latent pixels, T pixel frames, N text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise, ChunkResult, VideoCondition
from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.settings import CausalSettings
from fewstep.causal_video.vae_stream import VaeState

PromptMode = Literal["recache", "cross_only", "hard"]
MODES: tuple[PromptMode, ...] = ("recache", "cross_only", "hard")
# Of each weight, the numbers that enter a fingerprint: enough to tell any two trainings apart, and quick to read.
SAMPLED = 64


@dataclass(frozen=True)
class ChunkSeconds:
    """Where the time of a chunk went: the context call of the chunk before, its own calls, its decoding."""

    context: float
    denoise: float
    decode: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.context + self.denoise + self.decode


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

    def images(self, row: int = 0) -> np.ndarray:
        """Frames of one sample as uint8 [T, H, W, 3]. Raises ValueError in a session without a VAE."""
        if self.frames is None:
            raise ValueError("this session has no VAE and makes latents alone: open it with decode=True")
        return frames_to_images(self.frames[row])


def frames_to_images(frames: Tensor) -> np.ndarray:
    """[3, T, H, W] in [0, 1] as uint8 [T, H, W, 3]."""
    return (frames.permute(1, 2, 3, 0) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


@dataclass(frozen=True, eq=False)
class KeptChunk:
    """A chunk that may have to be computed again, by its number in the cache: what it shows to later ones, and the
    times [B, n] of that."""

    chunk: int
    shown: Tensor
    times: Tensor
    extra: Tensor | None


@dataclass(frozen=True, eq=False)
class PendingChunk:
    """A chunk that was shown and is not context yet."""

    result: ChunkResult
    condition: VideoCondition
    number: int


@dataclass(frozen=True, eq=False)
class PromptSwitch:
    """Another text from a chunk on; `caption` is what it was encoded from."""

    chunk: int
    prompt: Prompt
    mode: PromptMode
    caption: str


@dataclass(frozen=True, eq=False)
class StreamState:
    """Everything a session is, beside network and VAE; to be stored and restored as it is.

    Attributes:
        chunk: chunks that were shown.
        cache: of the chunks before the pending one.
        pending: the last chunk, until the next one is asked for.
        kept: latents of the stored segments, for a change of the prompt.
        condition: the prompt, and the image of the first frame.
        vae: history of the decoder.
        caption: what the prompt was encoded from, for people; empty where nobody said.
        switches: prompts of chunks to come, in order.
        noise: of the stream.
        settings: of the stream.
        model: `fingerprint` of the network.
    """

    chunk: int
    cache: RollingCache
    pending: PendingChunk | None
    kept: tuple[KeptChunk, ...]
    condition: VideoCondition
    vae: VaeState
    caption: str
    switches: tuple[PromptSwitch, ...]
    noise: ChunkNoise
    settings: CausalSettings
    model: str

    @property
    def prompt(self) -> Prompt:
        """The text with its keys and values."""
        text = self.condition.text
        assert isinstance(text, Prompt)
        return text

    @property
    def since_cut(self) -> int:
        """Chunks that were shown since the beginning, or since the last cut."""
        return self.cache.next_chunk + (0 if self.pending is None else 1)

    def local_chunk(self, chunk: int) -> int:
        """The number that a chunk to come has in the layout: counted from the last cut before it, planned ones too."""
        cuts = [switch.chunk for switch in self.switches if switch.mode == "hard" and switch.chunk <= chunk]
        return chunk - max(cuts) if cuts else self.since_cut + chunk - self.chunk


def fingerprint(network: CausalWan) -> str:
    """A name of the weights: a hash over names, shapes, dtypes and the first numbers of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in network.transformer.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().flatten()[:SAMPLED].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_state(state: StreamState, *, settings: CausalSettings, model: str, decodes: bool) -> None:
    """Raise ValueError unless a session of this network and these settings can go on from a state."""
    if state.model != model:
        raise ValueError("the snapshot was taken of another model: its keys and values mean nothing to this one")
    if state.settings != settings:
        raise ValueError("the snapshot was taken under another layout, policy or schedule than this session has")
    if decodes and state.vae.frames != settings.layout.start(state.since_cut):
        raise ValueError(
            f"the snapshot knows {state.vae.frames} decoded latent frames of {settings.layout.start(state.since_cut)}"
            ": it was taken in a session without a VAE, and can go on in one without alone"
        )


def state_bytes(states: Iterable[StreamState]) -> int:
    """Memory that states hold together: each storage once, whatever they share; the text's keys and values with it."""
    storages: dict[int, int] = {}

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, tuple | list):
            for part in value:
                add(part)
        elif is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                add(getattr(value, field.name))

    for state in states:
        add(state)
    return sum(storages.values())
