"""A video that is played: each chunk is made for the keys that are held, and comes back as PNG files.

Students that take actions get them as conditioning channels. Students of text alone are steered by their prompt: a
template with {action} in it, such as "a seven moving {action} quickly", changes when the action does.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.causal_video.stream.state import MODES, PromptMode, StreamState, state_bytes
from fewstep.causal_video.stream.world import NONE

PLACEHOLDER = "{action}"
ARROWS = ("left", "right", "up", "down")
# Snapshots are kept in memory, where each holds a cache; the oldest goes first. The number is for people, the bytes for
# the device: at 14 billion parameters and 480 pixels a cache of 12 latent frames is 15 GB.
MOST_SNAPSHOTS = 20
SNAPSHOT_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class WorldStatus:
    """What a page shows beside the video.

    Attributes:
        chunk: chunks that were made.
        prompt: the text as it was typed, with its placeholder.
        steering: "actions", "prompt" or "none": how keys reach the student.
        actions: names of what can be held.
        rate: frames per second of the video.
        size: (H, W) in pixels.
        snapshots: numbers of those that can be restored.
    """

    chunk: int
    prompt: str
    steering: Literal["actions", "prompt", "none"]
    actions: tuple[str, ...]
    rate: int
    size: tuple[int, int]
    snapshots: tuple[int, ...]


@dataclass(frozen=True)
class WorldChunk:
    """A chunk as PNG files, a file per frame, and the seconds it took."""

    chunk: int
    pictures: tuple[bytes, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class Saved:
    """A snapshot, and the words that were in force."""

    state: StreamState
    prompt: str
    action: str


class World:
    """One stream that several requests may reach at once; each call waits for the one before.

    Args:
        pipe: the student.
        prompt: text to begin with, with {action} in it to steer a student of text.
        seed: of the first stream.
        mode: what a change of the prompt does to the past, see `StreamSession.set_prompt`.
        actions: what the placeholder can be, for a student of text.
        snapshot_bytes: memory that all snapshots may hold together, what they share with each other counted once.

    Raises:
        ValueError: the placeholder in a prompt of a student that takes actions, an unknown mode, or no bytes.
    """

    def __init__(
        self,
        pipe: CausalVideoPipeline,
        prompt: str,
        *,
        seed: int = 0,
        mode: PromptMode = "recache",
        actions: tuple[str, ...] = ARROWS,
        snapshot_bytes: int = SNAPSHOT_BYTES,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
        if snapshot_bytes < 1:
            raise ValueError(f"snapshot_bytes is {snapshot_bytes}; snapshots need at least one")
        self._budget = snapshot_bytes
        self.pipe = pipe
        self.mode: PromptMode = mode
        self._space = pipe.actions
        self._names = actions if self._space is None else self._space.names
        self._lock = threading.Lock()
        self._saved: dict[int, Saved] = {}
        self._count = 0
        self._action = NONE
        self._prompt = self._checked(prompt)
        self._session = pipe.open(self._worded(self._prompt, NONE), seed=seed)

    def status(self) -> WorldStatus:
        """What there is to show."""
        with self._lock:
            return WorldStatus(
                chunk=self._session.chunk,
                prompt=self._prompt,
                steering=self._steering(),
                actions=self._names if self._steering() != "none" else (),
                rate=self.pipe.defaults.frames_per_second,
                size=self.pipe.pixel_size(),
                snapshots=tuple(self._saved),
            )

    def step(self, action: str = NONE) -> WorldChunk:
        """The next chunk, with an action held. Under a prompt that steers, "none" goes on as before.

        Raises:
            ValueError: an unknown action.
        """
        with self._lock:
            if action not in (NONE, *self._names):
                raise ValueError(f"unknown action {action!r}; known are {[NONE, *self._names]}")
            if self._space is not None:
                output = self._session.step(action)
            else:
                self._say(action)
                output = self._session.step()
            return WorldChunk(output.chunk, tuple(map(png, output.images())), output.seconds.total)

    def set_prompt(self, prompt: str, mode: PromptMode | None = None) -> None:
        """Another text from the next chunk on. Raises ValueError as the constructor does."""
        with self._lock:
            prompt = self._checked(prompt)
            self._session.set_prompt(self._worded(prompt, self._action), self.mode if mode is None else mode)
            self._prompt = prompt

    def reset(self, seed: int = 0) -> None:
        """Begin anew with the prompt that is in force; snapshots stay."""
        with self._lock:
            self._action = NONE
            self._session = self.pipe.open(self._worded(self._prompt, NONE), seed=seed)

    def save(self) -> int:
        """Keep the state; gives its number for `restore`. The oldest ones go where there are too many, or too large.

        Raises:
            ValueError: this one alone is beyond the budget of bytes.
        """
        with self._lock:
            state = self._session.snapshot()
            alone = state_bytes([state])
            if alone > self._budget:
                raise ValueError(
                    f"a snapshot holds {alone / 1e6:,.1f} MB and {self._budget / 1e6:,.1f} MB are allowed: give "
                    "--snapshot_gb more, or a policy with a smaller window"
                )
            self._count += 1
            self._saved[self._count] = Saved(state, self._prompt, self._action)
            while len(self._saved) > MOST_SNAPSHOTS or self._held() > self._budget:
                del self._saved[min(self._saved)]
            return self._count

    def snapshot(self, number: int) -> StreamState:
        """A kept state. Raises ValueError for a number that there is not."""
        with self._lock:
            return self._kept(number).state

    def restore(self, number: int) -> None:
        """Go on from a kept state. Raises ValueError for a number that there is not."""
        with self._lock:
            saved = self._kept(number)
            self._session.restore(saved.state)
            self._prompt, self._action = saved.prompt, saved.action

    def _held(self) -> int:
        return state_bytes([saved.state for saved in self._saved.values()])

    def _kept(self, number: int) -> Saved:
        if number not in self._saved:
            raise ValueError(f"there is no snapshot {number}; there are {list(self._saved)}")
        return self._saved[number]

    def _steering(self) -> Literal["actions", "prompt", "none"]:
        if self._space is not None:
            return "actions"
        return "prompt" if PLACEHOLDER in self._prompt else "none"

    def _say(self, action: str) -> None:
        """Put the action into the prompt, where it is another one than before."""
        if action in (NONE, self._action) or PLACEHOLDER not in self._prompt:
            return
        self._session.set_prompt(self._worded(self._prompt, action), self.mode)
        self._action = action

    def _worded(self, prompt: str, action: str) -> str:
        """The prompt with an action in it, the first one where none is held."""
        return prompt.replace(PLACEHOLDER, self._names[0] if action == NONE else action)

    def _checked(self, prompt: str) -> str:
        if self._space is not None and PLACEHOLDER in prompt:
            raise ValueError(f"this student takes actions themselves: leave {PLACEHOLDER} out of the prompt")
        return prompt


def png(image: np.ndarray) -> bytes:
    """A frame, uint8 [H, W, 3], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
