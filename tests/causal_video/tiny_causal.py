"""A tiny causal student in float64, inputs for it, and layouts and policies for hypothesis.

Three layers, so that what a cached key saw matters; wide weights, so that attention is far from uniform.
"""

import functools
import itertools

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from hypothesis import strategies as st
from torch import Tensor

from fewstep.causal_video.cache.rolling import RollingCache
from fewstep.causal_video.denoise import ChunkNoise
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.network import CausalWan
from fewstep.causal_video.model.prefix import Prefix
from fewstep.causal_video.policy import KEEP_ALL, CachePolicy, QuantiseKind
from tests.tiny_networks import draw, widen_weights

CHANNELS = 4
SIZE = (CHANNELS, 4, 4)
TEXT_SHAPE = (5, 16)
FRAME_TOKENS = 4
LAYOUTS = ((1, 2, 2, 2), (2, 2, 2, 1), (1,) * 7, (7,))
FRAMES = 7


def build_student(*, extra: int = 0, seed: int = 0, layers: int = 3) -> CausalWan:
    """A student in float64 and eval mode; `extra` conditioning channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=CHANNELS + extra,
            out_channels=CHANNELS,
            text_dim=TEXT_SHAPE[1],
            freq_dim=32,
            ffn_dim=48,
            num_layers=layers,
            rope_max_seq_len=64,
        )
        widen_weights(transformer)
    return CausalWan(transformer.double().eval())


@functools.cache
def shared_student() -> CausalWan:
    """One student for tests that change nothing; without gradients."""
    student = build_student()
    student.requires_grad_(False)
    return student


def build_vae(seed: int = 0, *, residual: bool = False) -> AutoencoderKLWan:
    """A tiny Wan VAE in float64: temporal stride 4, with statistics of its latents; `residual` is that of Wan 2.2."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4 if residual else None,
            z_dim=CHANNELS,
            dim_mult=[1, 2, 2],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 1.0, 2.0],
            is_residual=residual,
            in_channels=12 if residual else 3,
            out_channels=12 if residual else 3,
            patch_size=2 if residual else None,
            scale_factor_spatial=8 if residual else 4,
        )
    return vae.double().eval().requires_grad_(False)


def latents(frames: int = FRAMES, *, batch: int = 2, seed: int = 1, channels: int = CHANNELS) -> Tensor:
    """[batch, channels, frames, 4, 4]."""
    return draw((batch, channels, frames, *SIZE[1:]), seed, torch.float64)


def text(batch: int = 2, seed: int = 2) -> Tensor:
    """[batch, 5, 16]."""
    return draw((batch, *TEXT_SHAPE), seed, torch.float64)


def chunk_times(layout: ChunkLayout, *, batch: int = 2, seed: int = 3) -> Tensor:
    """Random times [batch, frames], the same inside a chunk."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(batch, layout.chunks, generator=generator, dtype=torch.float64)
    return times.repeat_interleave(torch.tensor(layout.lengths), dim=1)


def noise(batch: int = 2, *, seed: int = 0, iteration: int = 0) -> ChunkNoise:
    """Noise of `batch` samples."""
    return ChunkNoise(seed, tuple(range(batch)), SIZE, iteration)


def span(layout: ChunkLayout, chunk: int) -> slice:
    """Frames of a chunk."""
    return slice(layout.start(chunk), layout.end(chunk))


@torch.no_grad()
def fill(
    student: CausalWan, x: Tensor, t: Tensor, tokens: Tensor, layout: ChunkLayout, policy: CachePolicy = KEEP_ALL
) -> tuple[Tensor, RollingCache, list[Prefix]]:
    """Append chunk after chunk: velocities, the last cache, and what each chunk saw."""
    cache, velocities, prefixes = RollingCache.empty(layout, policy), [], []
    for chunk in range(layout.chunks):
        prefixes.append(cache.read())
        part = span(layout, chunk)
        output = student.append(x[:, :, part], t[:, part], tokens, prefixes[-1])
        assert output.keys_values is not None
        velocities.append(output.velocity)
        cache = cache.commit(output.keys_values)
    return torch.cat(velocities, dim=2), cache, prefixes


@st.composite
def layouts(draw_: st.DrawFn, *, most: int = 6, equal: bool = False) -> ChunkLayout:
    """One to `most` chunks of one to three frames."""
    if equal:
        return ChunkLayout((draw_(st.integers(1, 2)),) * draw_(st.integers(1, most)))
    return ChunkLayout(tuple(draw_(st.lists(st.integers(1, 3), min_size=1, max_size=most))))


@st.composite
def windows(draw_: st.DrawFn, layout: ChunkLayout, *, positions: str = "absolute") -> CachePolicy:
    """All of the past, a window, or a window and a sink of some first chunks."""
    window = draw_(st.none() | st.integers(1, 3))
    if window is None:
        return CachePolicy()
    sink = draw_(st.integers(0, min(2, layout.chunks)))
    ends = [0, *itertools.accumulate(layout.lengths)]
    return CachePolicy(
        window_frames=window * layout.longest,
        sink_frames=ends[sink],
        sink="none" if sink == 0 else "identity",
        positions=positions,  # pyright: ignore[reportArgumentType]
    )


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return float((a - b).detach().abs().max())


def quantised_cache_bytes(
    frames: int, *, tokens_per_frame: int, layers: int, batch: int, heads: int, head_width: int, kind: QuantiseKind
) -> int:
    """Size of quantised keys and values: a byte per number, and an fp32 scale per token and head."""
    assert kind in ("int8", "fp8")
    number, scale = 1, 4
    return 2 * layers * batch * frames * tokens_per_frame * heads * (head_width * number + scale)
