"""Loads an export again and compares it with the sampler of the training.

B pictures or videos, latents [B, C, H, W] or [B, C, F, H, W], K steps.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fewstep.core.denoiser import Denoiser
from fewstep.core.export.sampler import SamplerSpec
from fewstep.core.export.schedulers import SchedulerPlan
from fewstep.core.families.family import Family
from fewstep.core.student import Student
from fewstep.core.two_time import second_time_of

PROBE_SEED = 20240514
TIMESTEP_TOLERANCE, TIME_TOLERANCE = 1e-3, 2e-6


class ExportMismatchError(RuntimeError):
    """The files of an export do not do what the training did; the message has the numbers."""


@dataclass(frozen=True)
class Probe:
    """One input of the comparison: prompts, latents [B, C, H, W] and the noise between steps, K - 1 times [B, C, H, W].

    seed: torch's global generator, set to it, draws `renoise` one after the other, in the state of the stock call; a
        CPU generator of it draws `latents`.
    guidance: the scale that a network with a guidance embedding is told, None for others.
    picture: [1, 3, H, W] that a network is told, None for others.
    frames: pixel frames of a video, None for the pipeline's own, and for pictures.
    """

    prompts: tuple[str, ...]
    height: int | None
    width: int | None
    latents: Tensor
    renoise: tuple[Tensor, ...]
    seed: int
    guidance: float | None = None
    frames: int | None = None
    picture: Tensor | None = None


def make_probe(
    pipeline: DiffusionPipeline,
    family: Family,
    *,
    spec: SamplerSpec,
    device: torch.device,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
) -> Probe:
    """A probe for pictures or videos of `height` x `width` pixels and `frames`, by default the pipeline's own size.

    Raises ValueError where frames are given for pictures.
    """
    shape = (len(family.probe_prompts), *family.latent_shape(pipeline, height, width, frames))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(PROBE_SEED)).to(device)
    # Stock calls draw the noise between steps in the shape of their own state.
    state = family.stock_state(pipeline, latents).shape
    with _seeded(PROBE_SEED, device):
        drawn = [torch.randn(state, device=device) for _ in range(spec.steps - 1)]
    renoise = tuple(family.canonical_latents(pipeline, noise, tuple(shape[1:])) for noise in drawn)
    picture = None
    if family.takes_picture:
        size = family.call_arguments(pipeline, height=height, width=width, frames=frames)
        sides = (size["height"], size["width"])
        # Of 8 bits, as a picture of a file is.
        eight_bits = torch.randint(256, (1, 3, *sides), generator=torch.Generator().manual_seed(PROBE_SEED))
        picture = (eight_bits / 255).to(device)
    return Probe(family.probe_prompts, height, width, latents, renoise, PROBE_SEED, frames=frames, picture=picture)


def training_latents(
    network: nn.Module, family: Family, *, pipeline: DiffusionPipeline, spec: SamplerSpec, probe: Probe
) -> Tensor:
    """What the student of the training makes of a probe, with the text encoders of `pipeline`: latents [B, C, H, W]."""
    texts = list(probe.prompts)
    with torch.no_grad():
        if probe.picture is None:
            condition = family.encode_prompts(pipeline, texts, height=probe.height, width=probe.width)
        else:
            pictures = probe.picture.expand(len(texts), -1, -1, -1)
            condition = family.encode_with_pictures(pipeline, texts, pictures, tuple(probe.latents.shape[1:]))
    if probe.guidance is not None:
        scales = torch.full((condition.batch_size,), probe.guidance, device=probe.latents.device)
        condition = replace(condition, guidance=scales)
    family.prepare_network(network)
    # A second time that is in the weights already makes the jump an Euler step.
    baked = spec.sampler == "flow_map" and second_time_of(network) is None
    student = Student(Denoiser(network, family), times=spec.times, sampler="ode" if baked else spec.sampler)
    return student.sample(probe.latents, condition, probe.renoise)


def pipeline_latents(
    pipeline: Any,
    family: Family,
    plan: SchedulerPlan,
    probe: Probe,
    *,
    guidance: Mapping[str, Any],
    networks: Sequence[str],
) -> tuple[Tensor, list[float]]:
    """What a diffusers pipeline makes of a probe when it is called with these arguments of guidance, and the timesteps
    that its networks, the components of these names, were called with."""
    seen: list[float] = []
    size = family.call_arguments(pipeline, height=probe.height, width=probe.width, frames=probe.frames)

    def record(_module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        timestep = next((named[name] for name in ("timestep", "t") if name in named), None)
        timestep = positional[1] if timestep is None else timestep
        # Where times are told per token, those of a given first frame are 0.
        seen.append(float(torch.as_tensor(timestep).flatten()[-1]))

    handles = [getattr(pipeline, name).register_forward_pre_hook(record, with_kwargs=True) for name in networks]
    pipeline.set_progress_bar_config(disable=True)
    arguments = family.text_arguments(probe.prompts, guided=False) | size | dict(guidance) | plan.extra_arguments()
    if probe.picture is not None:
        arguments |= family.picture_arguments(probe.picture)
    arguments |= family.latent_arguments(pipeline, probe.latents, probe.seed)
    try:
        with _seeded(probe.seed, probe.latents.device):
            latents = family.latent_call(pipeline, arguments | {"num_inference_steps": plan.num_inference_steps})
    finally:
        for handle in handles:
            handle.remove()
    return family.canonical_latents(pipeline, latents, tuple(probe.latents.shape[1:])), seen


def check_timesteps(seen: list[float], plan: SchedulerPlan) -> None:
    """Raise ExportMismatchError unless the network was called at the planned timesteps and no other."""
    expected = plan.network_timesteps
    same_count = len(seen) == len(expected)
    # Some networks are told t, or 1 - t, and others 1,000 t.
    allowed = TIMESTEP_TOLERANCE if max(map(abs, expected), default=0.0) > 1 else TIME_TOLERANCE
    if not same_count or any(abs(a - b) > allowed for a, b in zip(seen, expected, strict=True)):
        raise ExportMismatchError(
            f"the exported pipeline calls its network at the timesteps {seen}, the student was trained at "
            f"{list(expected)} (allowed difference {allowed:g}). The scheduler in the export is not the "
            "planned one, or this version of diffusers reads it in another way."
        )


def relative_difference(latents: Tensor, reference: Tensor) -> float:
    """max|latents - reference| / max|reference|; inf if a value is not finite."""
    if latents.shape != reference.shape:
        raise ExportMismatchError(f"latents have shape {tuple(latents.shape)}, expected {tuple(reference.shape)}")
    difference = (latents.float() - reference.float()).abs().max() / reference.float().abs().max()
    return difference.item() if torch.isfinite(difference) else float("inf")


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators at `seed` inside, and as they were before outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
