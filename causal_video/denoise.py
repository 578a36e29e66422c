"""One chunk from noise to a prediction: the loop that rollouts and streams share.

Legend: B batch, C channels, F frames, n frames of a chunk, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewstep.causal_video.model.block import Prompt
from fewstep.causal_video.model.calls import CallOutput, chunk_call, condition_first_frame
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.model.prefix import KeysValues, Prefix
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import sample_noise


@dataclass(frozen=True)
class ChunkNoise:
    """Noise of a stream as a function of (seed, sample, chunk, step): how much is generated changes nothing.

    Attributes:
        seed: of the run.
        indices: global sample index of each row, B of them; every process has its own.
        size: (C, h, w) of a latent frame.
        iteration: training step.
        stream: a name that tells this use from others of the same seed.
    """

    seed: int
    indices: tuple[int, ...]
    size: tuple[int, int, int]
    iteration: int = 0
    stream: str = "video"

    def draw(self, chunk: int, step: int, frames: int, like: Tensor) -> Tensor:
        """Standard normal [B, C, frames, h, w] on the device of `like`, in its dtype but fp32 at least."""
        channels, height, width = self.size
        return sample_noise(
            self.seed,
            self.indices,
            (channels, frames, height, width),
            step=self.iteration,
            stream=f"{self.stream} chunk {chunk} step {step}",
            device=like.device,
            dtype=torch.promote_types(like.dtype, torch.float32),
        )


@dataclass(frozen=True, eq=False)
class VideoCondition:
    """What a video is conditioned on.

    Attributes:
        text: embeddings [B, N, width], or a `Prompt`.
        image: latent [B, C, 1, h, w] of a given first frame, or None.
        extra: conditioning channels [B, Ce, F, h, w] of the frames that are generated, or None.
    """

    text: Tensor | Prompt
    image: Tensor | None = None
    extra: Tensor | None = None

    def of_chunk(self, start: int, frames: int, *, is_first: bool, text: Tensor | Prompt) -> VideoCondition:
        """The part of one chunk: `extra` from frame `start` on, the image in the first chunk alone.

        Raises:
            ValueError: `extra` ends before the chunk does.
        """
        extra = None if self.extra is None else self.extra[:, :, start : start + frames]
        if extra is not None and extra.shape[2] != frames:
            raise ValueError(f"conditioning channels of frames {start} to {start + frames - 1} are missing")
        return VideoCondition(text, self.image if is_first else None, extra)


@dataclass(frozen=True, eq=False)
class ExitStep:
    """Everything the last call of a chunk depends on beside weights and text, without a graph.

    Attributes:
        x: [B, C, n, h, w] its input.
        t: [B, n] its times.
        prefix: what it saw.
        extra: conditioning channels [B, Ce, n, h, w], or None.
        r: [B, n] times at which the step of a flow map ends; None for a network of one time.
    """

    x: Tensor
    t: Tensor
    prefix: Prefix
    extra: Tensor | None
    r: Tensor | None = None

    def predict(self, network: nn.Module, text: Tensor | Prompt, *, collect: bool = False) -> ChunkResult:
        """Make the call on a `CausalWan` or its wrapper: x0 [B, C, n, h, w], with a graph where gradients are on.

        A flow map that stops on its way, r > 0, goes on to 0 by a second call with a graph (AnyFlow, arXiv:2605.13724).
        """
        output = self.call(network, text, self.x, self.t, self.r, collect=collect)
        if self.r is None:
            return ChunkResult(x0_from_velocity(self.x, output.velocity, self.t), self, output.keys_values)
        x = flow_jump(self.x, output.velocity, self.t, self.r)
        if bool((self.r > 0).any()):
            velocity = self.call(network, text, x, self.r, torch.zeros_like(self.r)).velocity
            x = flow_jump(x, velocity, self.r, torch.zeros_like(self.r))
        return ChunkResult(x, self, output.keys_values)

    def call(
        self,
        network: nn.Module,
        text: Tensor | Prompt,
        x: Tensor,
        t: Tensor,
        r: Tensor | None,
        *,
        collect: bool = False,
    ) -> CallOutput:
        """A call from t down to r on what this step sees."""
        output = network(chunk_call(x, t, text, self.prefix, extra=self.extra, collect=collect, r=r))
        assert isinstance(output, CallOutput)
        return output


@dataclass(frozen=True, eq=False)
class ChunkResult:
    """The prediction x0 [B, C, n, h, w] of a chunk, its exit step, and keys and values of that call if collected."""

    x0: Tensor
    exit: ExitStep
    keys_values: KeysValues | None

    def without_context(self) -> ChunkResult:
        """The same without the keys and values that the call saw and made, for which no replay is left."""
        return ChunkResult(self.x0, replace(self.exit, prefix=Prefix((), (), ())), None)


def denoise_chunk(
    network: CausalWan,
    noise: Sequence[Tensor],
    times: Sequence[float],
    condition: VideoCondition,
    prefix: Prefix,
    *,
    collect: bool = False,
    exit_network: nn.Module | None = None,
    last: float = 0.0,
) -> ChunkResult:
    """len(times) calls; all but the last without gradients. Between calls predictions are noised afresh; a network of
    two times, a flow map, jumps from each time to the next instead.

    Args:
        network: a `CausalWan`.
        noise: one [B, C, n, h, w] per time: the start, then what each prediction is noised with.
        times: falling, of the calls that are made; the last one is the exit.
        condition: of this chunk.
        prefix: what the chunk sees.
        collect: whether to return keys and values of the exit call.
        exit_network: called in place of `network` at the exit, for instance its DDP wrapper.
        last: where the exit of a flow map ends.

    Raises:
        ValueError: not one noise per time.
    """
    if len(noise) != len(times) or len(times) == 0:
        raise ValueError(f"{len(times)} calls need as many noise tensors and at least one, got {len(noise)}")
    x, ends = noise[0], (*times[1:], last)
    with torch.no_grad():
        for step in range(len(times) - 1):
            made = exit_at(x, times[step], condition, prefix, end=ends[step] if network.has_two_times else None)
            if made.r is None:
                x0 = made.predict(network, condition.text).x0
                x = add_noise(x0, noise[step + 1].to(x0), torch.full_like(x0[:, 0, 0, 0, 0], ends[step]))
            else:
                velocity = made.call(network, condition.text, made.x, made.t, made.r).velocity
                x = flow_jump(made.x, velocity, made.t, made.r)
    exit_step = exit_at(x, times[-1], condition, prefix, end=last if network.has_two_times else None)
    return exit_step.predict(network if exit_network is None else exit_network, condition.text, collect=collect)


def flow_jump(x: Tensor, velocity: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r = x_t - (t - r) u(x_t, t, r) [B, C, n, h, w], at times [B, n]."""
    return x0_from_velocity(x, velocity, t - r)


def exit_at(x: Tensor, time: float, condition: VideoCondition, prefix: Prefix, *, end: float | None = None) -> ExitStep:
    """The call on x at one time, a given first frame put in its place; `end` is where a flow map's step ends."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    t = torch.full((len(x),), time, dtype=x.dtype, device=x.device)
    x, t = condition_first_frame(x, t, condition.image)
    return ExitStep(x, t, prefix, condition.extra, None if end is None else t.clamp(max=end))
