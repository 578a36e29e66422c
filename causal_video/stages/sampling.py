"""Many-step sampling of causal networks that know velocities alone, such as those of teacher and diffusion forcing.

Legend: B batch, C channels, F frames, N text tokens; videos [B, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.model.calls import condition_first_frame
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.settings import CausalSettings


@dataclass(frozen=True)
class Sides:
    """The parts of a batch that guidance joins: without text, without controls, and with all, those that are needed."""

    guidance: float
    control_guidance: float | None

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 + (self.guidance != 1) + (self.control_guidance is not None)

    def controls(self, extra: Tensor | None) -> Tensor | None:
        """Conditioning channels of all sides."""
        if extra is None or self.control_guidance is None:
            return None if extra is None else torch.cat([extra] * self.count)
        return torch.cat([torch.zeros_like(extra)] * (self.count - 1) + [extra])

    def joined(self, velocity: Tensor) -> Tensor:
        """The guided velocity of those of all sides."""
        parts = list(velocity.chunk(self.count))
        told = 0.0 if self.control_guidance is None else self.control_guidance * (parts[-1] - parts[-2])
        if self.control_guidance is not None:
            parts.pop()
        return parts[0] + (self.guidance * (parts[1] - parts[0]) if self.guidance != 1 else 0.0) + told


@torch.no_grad()
def euler_rollout(
    network: CausalWan,
    condition: VideoCondition,
    noise: ChunkNoise,
    settings: CausalSettings,
    *,
    times: Sequence[float],
    guidance: float = 1.0,
    null_text: Tensor | None = None,
    control_guidance: float | None = None,
) -> Tensor:
    """A video chunk by chunk over the cache, each by Euler steps with guidance u + w (c - u); context is clean.

    The sides of guidance have a cache of their own, filled under their own text and controls, as one batch.

    Args:
        network: a causal student.
        condition: text [B, N, width], with image and conditioning channels if given; both sides of guidance get the
            channels.
        noise: its first draw of each chunk is used.
        settings: layout, all listed chunks of it, and policy; the schedule has no part here.
        times: falling, of every chunk.
        guidance: w; 1 is none.
        null_text: [1, N, width], for guidance.
        control_guidance: of conditioning channels by a side more, see `core.denoiser.guided_velocity`; None: all sides
            get them.

    Raises:
        ValueError: guidance without null_text, or text that is no tensor of embeddings.
    """
    if guidance != 1 and null_text is None:
        raise ValueError(f"guidance is {guidance}; give null_text, the embeddings of the empty prompt")
    text = condition.text
    if not isinstance(text, Tensor):
        raise ValueError("both sides of guidance are embedded here: give the text as embeddings [B, N, width]")
    sides = Sides(guidance, control_guidance if condition.extra is not None else None)
    texts = [text] * sides.count
    if guidance != 1 and null_text is not None:
        texts[0] = null_text.expand(len(text), -1, -1)
    copies, text = sides.count, torch.cat(texts)
    prompt = network.prompt(text)
    cache, done = RollingCache.empty(settings.layout, settings.policy), []
    for chunk in range(settings.layout.chunks):
        frames = settings.layout.length(chunk)
        part = condition.of_chunk(settings.layout.start(chunk), frames, is_first=chunk == 0, text=prompt)
        given, extra = part.image, sides.controls(part.extra)
        x, prefix = noise.draw(chunk, 0, frames, text), cache.read()
        for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
            time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            held, frame_time = condition_first_frame(x, time, given)
            states, frame_times = torch.cat([held] * copies), torch.cat([frame_time] * copies)
            velocity = network.readonly(states, frame_times, prompt, prefix, extra=extra)
            x = x + (t_next - t) * sides.joined(velocity)
        x, _ = condition_first_frame(x, torch.zeros_like(x[:, 0, 0, 0, 0]), given)
        clean = torch.zeros(copies * len(x), dtype=x.dtype, device=x.device)
        stored = network.append(torch.cat([x] * copies), clean, prompt, prefix, extra=extra).keys_values
        assert stored is not None
        cache = cache.commit(stored)
        done.append(x)
    return torch.cat(done, dim=2)
