"""Many-step sampling of causal networks that know velocities alone, such as those of teacher and diffusion forcing.

Legend: B batch, C channels, F frames, N text tokens; videos [B, C, F, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.model.calls import condition_first_frame
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.settings import CausalSettings


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
) -> Tensor:
    """A video chunk by chunk over the cache, each by Euler steps with guidance u + w (c - u); context is clean.

    Both sides of guidance have a cache of their own, filled under their own text, as one batch of twice the size.

    Args:
        network: a causal student.
        condition: text [B, N, width], with image and conditioning channels if given; both sides of guidance get the
            channels.
        noise: its first draw of each chunk is used.
        settings: layout, all listed chunks of it, and policy; the schedule has no part here.
        times: falling, of every chunk.
        guidance: w; 1 is none.
        null_text: [1, N, width], for guidance.

    Raises:
        ValueError: guidance without null_text, or text that is no tensor of embeddings.
    """
    if guidance != 1 and null_text is None:
        raise ValueError(f"guidance is {guidance}; give null_text, the embeddings of the empty prompt")
    text = condition.text
    if not isinstance(text, Tensor):
        raise ValueError("both sides of guidance are embedded here: give the text as embeddings [B, N, width]")
    copies = 1 if guidance == 1 else 2
    if guidance != 1 and null_text is not None:
        text = torch.cat([null_text.expand(len(text), -1, -1), text])
    prompt = network.prompt(text)
    cache, done = RollingCache.empty(settings.layout, settings.policy), []
    for chunk in range(settings.layout.chunks):
        frames = settings.layout.length(chunk)
        part = condition.of_chunk(settings.layout.start(chunk), frames, is_first=chunk == 0, text=prompt)
        given, extra = part.image, None if part.extra is None else torch.cat([part.extra] * copies)
        x, prefix = noise.draw(chunk, 0, frames, text), cache.read()
        for t, t_next in zip(times, (*times[1:], 0.0), strict=True):
            time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            held, frame_time = condition_first_frame(x, time, given)
            states, frame_times = torch.cat([held] * copies), torch.cat([frame_time] * copies)
            velocity = network.readonly(states, frame_times, prompt, prefix, extra=extra)
            if copies == 2:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
            x = x + (t_next - t) * velocity
        x, _ = condition_first_frame(x, torch.zeros_like(x[:, 0, 0, 0, 0]), given)
        clean = torch.zeros(copies * len(x), dtype=x.dtype, device=x.device)
        stored = network.append(torch.cat([x] * copies), clean, prompt, prefix, extra=extra).keys_values
        assert stored is not None
        cache = cache.commit(stored)
        done.append(x)
    return torch.cat(done, dim=2)
