"""Students that diffusers' own causal pipeline can run: an `AnyFlowFARPipeline` directory with the student's weights.

`model.far` makes its network of the student's, which there is block-causal with clean context and forgets nothing. Its
sampler takes Euler steps along average velocities, as students of two times do. Those of one time noise their
prediction afresh, so that samples are the same for one call per chunk alone. A window or a sink, other steps for some
chunks, noisy context, or streams without an end cannot be expressed there.

The cached call has no mask and fills its keys up to a multiple of 128 with zeros, which attention then sees. Chunks
must therefore have a multiple of 128 tokens; with others the video is another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AnyFlowFARPipeline
from torch import Tensor

from fewstep.causal_video.stream.pipeline import CausalVideoPipeline, far_pipeline
from fewstep.core.export.check import ExportMismatchError, relative_difference
from fewstep.core.grids import shift_of_grid

TOKEN_MULTIPLE = 128
FAR_TOLERANCE = 1e-4


def check_far(pipe: CausalVideoPipeline) -> None:
    """Raise ValueError, with the reason, for a student that `AnyFlowFARPipeline` cannot run."""
    settings, policy = pipe.settings, pipe.settings.policy
    if pipe.network.extra_channels > 0:
        raise ValueError("AnyFlowFAR takes latents and text alone: this student is told more of each frame")
    if policy.window_frames is not None and policy.window_frames < settings.layout.frames:
        raise ValueError("AnyFlowFAR sees all of the past: this student has a window")
    if policy.noisy_from is not None or policy.quantise != "none":
        raise ValueError("AnyFlowFAR keeps clean context in full precision: this student has another")
    times = set(settings.schedule.times)
    if settings.second_time == "none" and times != {(1.0,)}:
        raise ValueError(
            "AnyFlowFAR takes Euler steps: a student that noises afresh agrees with it for one call at t = 1"
        )
    if len(times) != 1:
        raise ValueError("AnyFlowFAR takes the same steps for every chunk: this student has others for some")
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

    It makes the chunks that the layout lists, no more: call it with the student's number of steps, the size and the
    number of frames, and `max_sequence_length` of the text the student knows.

    Args:
        pipe: a student of one call per chunk, or one of two times.
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
    far_pipeline(pipe.stock, pipe.settings).save_pretrained(output, safe_serialization=True)
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
    # The scheduler shifts given times once more: they are for grids that no shift makes, and it has none then.
    times = pipe.settings.schedule.of(0)
    steps = {"sigmas": list(times)} if shift_of_grid(times) is None else {"num_inference_steps": len(times)}
    height, width = pipe.pixel_size()
    loaded.set_progress_bar_config(disable=True)
    return loaded(
        prompt_embeds=state.prompt.tokens,
        latents=torch.cat(draws, dim=2),
        height=height,
        width=width,
        num_frames=4 * (layout.frames - 1) + 1,
        **steps,
        output_type="latent",
        return_dict=False,
    )[0]
