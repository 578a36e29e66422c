"""Pipelines of tiny causal students, of text or steered by actions, for tests of streams, servers and speed."""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

import functools
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.policy import CachePolicy
from fewstep.causal_video.schedule import StepSchedule
from fewstep.causal_video.settings import CausalSettings, StreamDefaults
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.causal_video.stream.state import ChunkOutput
from tests.tiny_networks import widen_weights
from tests.tiny_videos import TEXT_WIDTH, VIDEO_LATENTS, VIDEO_SIDE, build_video_pipeline

SETTINGS = CausalSettings(ChunkLayout((1, 2)), CachePolicy(4, 1, "static"), StepSchedule.steps([3, 2]))
NAMES = ("left", "right", "up", "down")


def build_stream_pipeline(
    *, actions: tuple[str, ...] = (), settings: CausalSettings = SETTINGS, seed: int = 0
) -> CausalVideoPipeline:
    """A student with random weights for 32 x 32 pixels, with a channel per action."""
    stock = build_video_pipeline(text_tokens=8, seed=seed)
    if actions:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer = WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=VIDEO_LATENTS[0] + len(actions),
                out_channels=VIDEO_LATENTS[0],
                text_dim=TEXT_WIDTH,
                freq_dim=32,
                ffn_dim=48,
                num_layers=3,
                rope_max_seq_len=64,
            )
            widen_weights(transformer)
        stock.register_modules(transformer=transformer.eval())
    return CausalVideoPipeline(stock, settings, StreamDefaults(VIDEO_SIDE, VIDEO_SIDE, 16, actions))


@functools.cache
def text_pipeline() -> CausalVideoPipeline:
    """One of text, for tests that change nothing."""
    return build_stream_pipeline()


@functools.cache
def action_pipeline() -> CausalVideoPipeline:
    """One that is steered, for tests that change nothing."""
    return build_stream_pipeline(actions=NAMES)


def latents_of(outputs: Sequence[ChunkOutput]) -> Tensor:
    """Latents [B, C, F, h, w] of chunks."""
    return torch.cat([output.latents for output in outputs], dim=2)


def frames_of(outputs: Sequence[ChunkOutput]) -> Tensor:
    """Frames [B, 3, T, H, W] of chunks."""
    return torch.cat([output.frames for output in outputs if output.frames is not None], dim=2)
