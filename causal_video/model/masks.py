"""Which tokens see which when many chunks go through the network in one call.

Both masks are full inside a chunk. They are built from the ends of chunks, and kept: tile schedules live with them.
A masked call gives every frame its absolute position, so it is the twin of a cache only where positions agree.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy, ChunkWindow
from fewstep.kernels import mask as masks
from fewstep.kernels.mask import AttentionMask


def block_causal(
    layout: ChunkLayout, tokens_per_frame: int, policy: CachePolicy = KEEP_ALL, *, device: torch.device | str = "cpu"
) -> AttentionMask:
    """Each chunk sees itself and what the policy shows of earlier ones; also the mask of diffusion forcing.

    Chunk cq sees ck <= cq with ck > cq - window or ck < sink; every query sees its own chunk.

    Args:
        layout: the chunks of the video.
        tokens_per_frame: tokens of one latent frame.
        policy: window and sink.
        device: where the mask lives.

    Raises:
        ValueError: the policy does not fit the layout, or no mask expresses it (see `expressible_window`).
    """
    window = expressible_window(layout, policy)
    return _block_causal(layout.tokens(tokens_per_frame), window, torch.device(device))


def teacher_forcing(
    layout: ChunkLayout,
    tokens_per_frame: int,
    policy: CachePolicy = KEEP_ALL,
    *,
    clean_is_constant: bool = False,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """The packed sequence [clean; noisy]: noisy chunks see clean chunks strictly before them, and themselves.

    Clean chunks see clean ones as in `block_causal`; both halves have the same positions.

    Args:
        layout: the chunks of one half.
        tokens_per_frame: tokens of one latent frame.
        policy: window and sink, counted from the noisy chunk's own place.
        clean_is_constant: promise that tangents of the clean half are zero: its frames, its time, text and conditioning
            channels are constants of the `torch.func.jvp`. Saves the work; a broken promise gives wrong tangents.
        device: where the mask lives.

    Raises:
        ValueError: as `block_causal`.
    """
    window = expressible_window(layout, policy)
    return _teacher_forcing(layout.tokens(tokens_per_frame), window, clean_is_constant, torch.device(device))


def expressible_window(layout: ChunkLayout, policy: CachePolicy) -> ChunkWindow:
    """The policy in chunks, if a mask over absolute positions means the same as a cache under that policy.

    Raises:
        ValueError: the policy does not fit the layout; or there is a gap between sink and window, and the sink is a
            running mean or its positions are not absolute.
    """
    window = policy.chunk_window(layout)
    if policy.sink == "ema" and window.window is not None and layout.chunks > window.window + 1:
        raise ValueError(
            f"sink='ema' changes what chunks see after chunk {window.window}, and no mask over {layout.chunks} chunks "
            "expresses that: train it by rollouts, or with a layout that the window holds"
        )
    if policy.positions != "absolute" and window.has_gap(layout.chunks):
        raise ValueError(
            f"positions={policy.positions!r} move the sink with the window, and one masked call gives a frame one "
            f"position for all {layout.chunks} chunks: use positions='absolute', rollouts, or a layout without a gap"
        )
    return window


@lru_cache(maxsize=64)
def _block_causal(tokens: tuple[int, ...], window: ChunkWindow, device: torch.device) -> AttentionMask:
    return masks.block_causal(tokens, window=window.window, sink=window.sink, device=device)


@lru_cache(maxsize=64)
def _teacher_forcing(
    tokens: tuple[int, ...], window: ChunkWindow, clean_is_constant: bool, device: torch.device
) -> AttentionMask:
    return masks.teacher_forcing(
        tokens, window=window.window, sink=window.sink, clean_is_constant=clean_is_constant, device=device
    )
