"""Students that diffusers' own causal pipeline can run: an `AnyFlowFARPipeline` directory with the student's weights.

What AnyFlowFAR (arXiv:2605.13724, diffusers 0.42) computes is a Wan transformer with a coarser patch embedding for old
chunks and a second time beside the first. Both vanish in its configuration: `full_chunk_limit` of at least the number
of chunks leaves no old chunks, and a gate of 0 leaves the second time out. What is left is the block-causal student
with clean context that forgets nothing. Its sampler takes Euler steps, where a student noises its prediction afresh, so
samples are the same for one call per chunk alone; students of more calls, a window or a sink, noisy context, or streams
without an end cannot be expressed there.

The cached call has no mask and fills its keys up to a multiple of 128 with zeros, which attention then sees. Chunks
must therefore have a multiple of 128 tokens; with others the video is another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model.network import TIME_SCALE
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline
from fewstep.core.export.check import ExportMismatchError, relative_difference

TOKEN_MULTIPLE = 128
# Patches of the branch for old chunks, which is never called.
COMPRESSED_PATCH = (1, 4, 4)
FAR_TOLERANCE = 1e-4


def far_transformer(transformer: WanTransformer3DModel, layout: ChunkLayout) -> AnyFlowFARTransformer3DModel:
    """A network of diffusers' class with the student's weights, for the chunks that `layout` lists.

    Raises:
        ValueError: a network with conditioning channels, image tokens or other norms than Wan 2.1.
    """
    config = transformer.config
    if config["in_channels"] != config["out_channels"] or config["image_dim"] is not None:
        raise ValueError("AnyFlowFAR takes latents and text alone: this network takes more")
    if config["qk_norm"] != "rms_norm_across_heads" or tuple(config["patch_size"]) != (1, 2, 2):
        raise ValueError("AnyFlowFAR has norms across heads and patches of 2 x 2: this network has others")
    with torch.random.fork_rng(devices=[]):
        network = AnyFlowFARTransformer3DModel(
            compressed_patch_size=COMPRESSED_PATCH,  # pyright: ignore[reportArgumentType]
            full_chunk_limit=layout.chunks,
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            cross_attn_norm=config["cross_attn_norm"],
            eps=config["eps"],
            rope_max_seq_len=config["rope_max_seq_len"],
            gate_value=0.0,
            chunk_partition=layout.lengths,
        )
    missing, unexpected = network.load_state_dict(transformer.state_dict(), strict=False)
    lost = [name for name in missing if "far_patch_embedding" not in name and "delta_embedder" not in name]
    if lost or unexpected:
        raise ValueError(f"the weights are not those of a Wan 2.1 transformer: missing {lost}, unexpected {unexpected}")
    nn.Module.to(network, device=transformer.device, dtype=transformer.dtype)
    return network.eval()


def check_far(pipe: CausalVideoPipeline) -> None:
    """Raise ValueError, with the reason, for a student that `AnyFlowFARPipeline` cannot run."""
    settings, policy = pipe.settings, pipe.settings.policy
    if policy.window_frames is not None and policy.window_frames < settings.layout.frames:
        raise ValueError("AnyFlowFAR sees all of the past: this student has a window")
    if policy.noisy_from is not None or policy.quantise != "none":
        raise ValueError("AnyFlowFAR keeps clean context in full precision: this student has another")
    if set(settings.schedule.times) != {(1.0,)}:
        raise ValueError(
            "AnyFlowFAR takes Euler steps: a student that noises afresh agrees with it for one call at t = 1"
        )
    channels, height, width = pipe.latent_size()
    per_frame = pipe.network.tokens_per_frame(torch.empty(0, channels, 1, height, width))
    odd = [length for length in settings.layout.lengths if length * per_frame % TOKEN_MULTIPLE]
    if odd:
        raise ValueError(
            f"chunks of {sorted(set(odd))} latent frames have {per_frame} tokens each, no multiple of "
            f"{TOKEN_MULTIPLE}: diffusers' cached attention would see the zeros it fills up with"
        )


def export_far(pipe: CausalVideoPipeline, output: str | Path, *, prompt: str = "a cat", seed: int = 0) -> float:
    """Write the student as an `AnyFlowFARPipeline` and compare the video it makes with the student's stream.

    It makes the chunks that the layout lists, no more: call it with `num_inference_steps=1`, the size and the number of
    frames, and `max_sequence_length` of the text the student knows.

    Args:
        pipe: a student of one call per chunk.
        output: directory to create.
        prompt: of the comparison.
        seed: of the comparison.

    Returns:
        The largest difference, of the largest latent.

    Raises:
        ValueError: the student cannot be expressed, or the directory exists.
        ExportMismatchError: the videos differ; the directory stays for inspection.
    """
    check_far(pipe)
    output = Path(output)
    if output.exists():
        raise ValueError(f"{output} exists: give another directory")
    stock = pipe.stock
    assert stock.transformer is not None
    exported = AnyFlowFARPipeline(
        tokenizer=stock.tokenizer,
        text_encoder=stock.text_encoder,
        transformer=far_transformer(stock.transformer, pipe.settings.layout),
        vae=stock.vae,
        scheduler=FlowMapEulerDiscreteScheduler(num_train_timesteps=int(TIME_SCALE)),
    )
    exported.save_pretrained(output, safe_serialization=True)
    loaded = AnyFlowFARPipeline.from_pretrained(output, dtype=torch.float32).to(pipe.device)
    difference = relative_difference(far_video(loaded, pipe, prompt, seed), streamed(pipe, prompt, seed))
    if not difference <= FAR_TOLERANCE:
        raise ExportMismatchError(
            f"AnyFlowFARPipeline makes a video that differs by {difference:.3e} of the largest latent (allowed "
            f"{FAR_TOLERANCE:.0e})"
        )
    return difference


def streamed(pipe: CausalVideoPipeline, prompt: str, seed: int) -> Tensor:
    """Latents [1, C, F, h, w] of the chunks that the layout lists."""
    return pipe(prompt, chunks=pipe.settings.layout.chunks, seed=seed, decode=False).latents


def far_video(loaded: Any, pipe: CausalVideoPipeline, prompt: str, seed: int) -> Tensor:
    """Latents [1, C, F, h, w] of diffusers' pipeline from the noise of the student's stream."""
    state, layout = pipe.open(prompt, seed=seed, decode=False).snapshot(), pipe.settings.layout
    draws = [state.noise.draw(chunk, 0, layout.length(chunk), state.prompt.tokens) for chunk in range(layout.chunks)]
    height, width = pipe.pixel_size()
    loaded.set_progress_bar_config(disable=True)
    return loaded(
        prompt_embeds=state.prompt.tokens,
        latents=torch.cat(draws, dim=2),
        height=height,
        width=width,
        num_frames=4 * (layout.frames - 1) + 1,
        num_inference_steps=1,
        output_type="latent",
        return_dict=False,
    )[0]
