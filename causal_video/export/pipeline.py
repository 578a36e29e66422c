"""The student of a run becomes a Wan pipeline directory with `causal_video.json` beside it.

Legend: B batch, C channels, F latent frames, h x w latent pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AnyFlowFARTransformer3DModel, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from fewstep.causal_video.denoise import ChunkNoise, VideoCondition
from fewstep.causal_video.export.card import CausalRecord, write_causal_card, write_causal_record
from fewstep.causal_video.export.run import (
    RunOfStudent,
    load_run_network,
    read_causal_run,
    settings_of_run,
    stream_defaults,
    trained_controls,
    trained_guidance,
    trained_smoothing,
    trained_times,
)
from fewstep.causal_video.layout import ChunkLayout
from fewstep.causal_video.model import masks
from fewstep.causal_video.model.calls import packed_call
from fewstep.causal_video.model.controls import add_features, features_of
from fewstep.causal_video.model.network import TIME_SCALE, CausalWan
from fewstep.causal_video.policy import KEEP_ALL
from fewstep.causal_video.rollout import rollout
from fewstep.causal_video.settings import CausalSettings, StreamDefaults
from fewstep.causal_video.stream.pipeline import CausalVideoPipeline, far_pipeline
from fewstep.causal_video.stream.world import spread
from fewstep.core.export.check import PROBE_SEED, ExportMismatchError, relative_difference
from fewstep.core.export.directory import check_finite, check_output, new_directory, remove_machine_names
from fewstep.core.export.model_card import license_of
from fewstep.core.export.pipeline import DTYPE_NAMES, LIBRARIES, ROUNDING_TOLERANCES, SAMPLER_TOLERANCE
from fewstep.core.export.record import Verification, public_name
from fewstep.core.export.run import find_checkpoint, load_base
from fewstep.core.families.wan import WanFamily
from fewstep.core.networks.lora import merge_lora
from fewstep.core.settings import ModelSource
from fewstep.core.teacher import Teacher
from fewstep.core.two_time import add_second_time, second_time_of

# Stock diffusers and the student do the same fp32 arithmetic in another order.
STOCK_TOLERANCE = 1e-4
# Latents of the corner on which diffusers' causal class is compared: a multiple of its coarser patches.
COMPARED_SIDE = 8


@dataclass(frozen=True)
class CausalReport:
    """What training knows about a student and an export cannot see in its weights; see `CausalRecord`."""

    method: str
    base_model: str
    guidance: float
    step: int
    ema: bool
    trained_times: tuple[tuple[float, ...], ...]
    name: str
    shift: float | None = None
    time_smoothing: float = 0.0


def export_causal_run(
    run: str | Path,
    output: str | Path | None = None,
    *,
    checkpoint: str = "latest",
    weights: Literal["ema", "live"] = "ema",
    steps: Sequence[int] | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    device: str = "cpu",
) -> tuple[Path, CausalRecord]:
    """Export the student of a run of scripts/train_causal_video.py or train_causal_reward.py; returns the directory and
    its record.

    Args:
        run: run directory with config.yaml and checkpoints.
        output: directory to create; by default "export" in the run directory.
        checkpoint: "latest", the name of a checkpoint of this run, or a path.
        weights: the moving average or the live weights.
        steps: network calls of each chunk, on grids of the run's shift, in place of the run's schedule. Stages of flow
            matching, which train no steps, need it.
        dtype: "float32", "float16" or "bfloat16" of the files.
        overwrite: replace an earlier export at `output`.
        device: where the comparison runs.

    Raises:
        ValueError: a file, key or weight is missing or does not fit.
        FileExistsError: `output` exists and `overwrite` is not given.
        ExportMismatchError: the loaded export differs from the rollout of the training; nothing is left at `output`.
    """
    run = Path(run)
    dtypes = {name: value for value, name in DTYPE_NAMES.items()}
    if dtype not in dtypes or weights not in ("ema", "live"):
        raise ValueError(f"dtype {dtype!r} (of {', '.join(dtypes)}) or weights {weights!r} (of ema, live) is unknown")
    output = run / "export" if output is None else Path(output)
    check_output(output, overwrite=overwrite)
    config = read_causal_run(run)
    settings = settings_of_run(config, steps)
    with torch.random.fork_rng(devices=[]):
        # Everything but the network is the same in both models.
        base = config.teacher if config.student.path is None else ModelSource(path=config.student.path)
        bits = config.teacher.quantise if base is config.teacher else "none"
        adapters = config.student.lora_rank > 0
        teacher = load_base(base, config.teacher.dtype, bits, has_adapters=adapters, device=device)
        actions = trained_controls(run, config)
        network, step = load_run_network(config, teacher, find_checkpoint(run, checkpoint), weights, len(actions))
        report = report_of(run, config, settings, base_model=base.path, step=step, ema=weights == "ema")
        defaults = replace(stream_defaults(config, teacher), actions=actions)
        record = export_causal_student(
            teacher, network, settings, defaults, output=output, report=report, dtype=dtypes[dtype]
        )
    return output, record


def report_of(
    run: Path, config: RunOfStudent, settings: CausalSettings, *, base_model: str, step: int, ema: bool
) -> CausalReport:
    """What a run says of its student."""
    return CausalReport(
        method=config.method,
        base_model=base_model,
        guidance=trained_guidance(config),
        step=step,
        ema=ema,
        trained_times=trained_times(config, settings),
        name=run.resolve().name,
        shift=config.student.shift if config.student.times is None else None,
        time_smoothing=trained_smoothing(run),
    )


def export_causal_student(
    teacher: Teacher,
    network: WanTransformer3DModel,
    settings: CausalSettings,
    defaults: StreamDefaults,
    *,
    output: Path,
    report: CausalReport,
    dtype: torch.dtype = torch.float32,
) -> CausalRecord:
    """Write a student, load it again, and compare its stream with `rollout`; an earlier export is replaced.

    Args:
        teacher: gives text encoder, VAE and scheduler; they are rounded to `dtype` on the way.
        network: the student's transformer, with or without adapters; it is not changed.
        settings: layout, policy and schedule.
        defaults: size, rate and actions of streams.
        output: directory to create.
        report: what the model card says about the training.
        dtype: of the files.

    Raises:
        ValueError: a weight is not finite in this dtype.
        ExportMismatchError: the loaded export differs; nothing is left at `output`.
    """
    trained = merged_network(network).float().eval()
    reference = probe_rollout(teacher.pipeline, trained, settings, defaults)
    with new_directory(output) as draft:
        stored = copy.deepcopy(trained)
        nn.Module.to(stored, dtype)
        check_finite(stored.state_dict(), dtype)
        write_pipeline(teacher.pipeline, stored, settings, draft, dtype, shift=report.shift)
        settings.save(draft, defaults, time_smoothing=report.time_smoothing)
        remove_machine_names(draft, public_name(report.base_model))
        rounded = probe_rollout(teacher.pipeline, stored, settings, defaults)
        verification, stock = verify_draft(draft, CausalWan(stored), rounded=rounded, reference=reference, dtype=dtype)
        record = CausalRecord(
            name=report.name,
            method=report.method,
            base_model=public_name(report.base_model),
            settings=settings,
            trained_times=report.trained_times,
            defaults=defaults,
            training_guidance=report.guidance,
            training_step=report.step,
            ema=report.ema,
            dtype=DTYPE_NAMES[dtype],
            verification=verification,
            stock_difference=stock,
            versions=tuple((library, version(library)) for library in LIBRARIES),
        )
        write_causal_record(record, draft)
        write_causal_card(record, draft, license_fields=license_of(teacher.path))
    return record


def verify_draft(
    draft: Path, student: CausalWan, *, rounded: Tensor, reference: Tensor, dtype: torch.dtype
) -> tuple[Verification, float]:
    """Load the files and compare; returns the differences, that of the stock transformer last.

    Args:
        draft: the directory.
        student: with the weights as stored, in fp32.
        rounded: the probe's rollout with them.
        reference: the probe's rollout with the weights as trained.
        dtype: of the files.

    Raises:
        ExportMismatchError: a difference is larger than allowed.
    """
    loaded = CausalVideoPipeline.from_pretrained(draft, device=student.transformer.device)
    verification = Verification(
        sampler_difference=relative_difference(probe_stream(loaded), rounded),
        sampler_tolerance=SAMPLER_TOLERANCE,
        rounding_difference=relative_difference(rounded, reference),
        rounding_tolerance=ROUNDING_TOLERANCES[dtype],
    )
    two = student.has_two_times
    stock = (far_difference if two else stock_difference)(draft, student, reference)
    check_verification(verification, stock, DTYPE_NAMES[dtype])
    return verification, stock


def merged_network(network: WanTransformer3DModel) -> WanTransformer3DModel:
    """A stock network with the same weights, adapters merged."""
    merged = copy.deepcopy(network)
    if getattr(merged, "peft_config", None):
        merge_lora(merged)
    with torch.random.fork_rng(devices=[]):
        plain = WanTransformer3DModel.from_config(merged.config)
    assert isinstance(plain, WanTransformer3DModel)
    layers, features = second_time_of(merged), features_of(merged)
    if layers is not None:
        add_second_time(plain, layers.kind)
    if features is not None:
        add_features(plain, features.channels)
    plain.load_state_dict(merged.state_dict())
    nn.Module.to(plain, merged.device)
    return plain


def write_pipeline(
    pipeline: Any,
    stored: WanTransformer3DModel,
    settings: CausalSettings,
    draft: Path,
    dtype: torch.dtype,
    *,
    shift: float | None = None,
) -> None:
    """Save the teacher's pipeline with the student in it, as diffusers' causal class where it has two times. All its
    modules end in fp32, rounded to the files' dtype."""
    pipeline.register_modules(transformer=stored)
    modules = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    for module in modules:
        module.to(dtype)
    files = pipeline if second_time_of(stored) is None else far_pipeline(pipeline, settings, shift=shift)
    files.save_pretrained(draft, safe_serialization=True)
    for module in modules:
        module.float()


def probe_noise(pipeline: CausalVideoPipeline) -> ChunkNoise:
    """The noise of a stream that is opened with the probe's seed."""
    indices = tuple(range(len(WanFamily.probe_prompts)))
    return ChunkNoise(PROBE_SEED, indices, pipeline.latent_size(), stream="stream")


def probe_chunks(settings: CausalSettings) -> int:
    """One chunk more than the layout lists, so that something is repeated."""
    return settings.layout.chunks + 1


@torch.no_grad()
def probe_rollout(
    pipeline: Any, transformer: WanTransformer3DModel, settings: CausalSettings, defaults: StreamDefaults
) -> Tensor:
    """Latents [B, C, F, h, w] that the training's rollout makes of the probe, with the text encoder of `pipeline`."""
    assert isinstance(pipeline, WanPipeline)
    before = pipeline.transformer
    pipeline.register_modules(transformer=transformer)
    opened = CausalVideoPipeline(pipeline, settings, defaults)
    exits = settings.schedule.exits(settings.schedule.longest - 1, probe_chunks(settings))
    frames = settings.layout.extended(probe_chunks(settings)).frames
    condition = VideoCondition(opened.encode(WanFamily.probe_prompts), extra=probe_controls(opened, frames))
    video = rollout(opened.network, condition, probe_noise(opened), settings, exits=exits).video
    pipeline.register_modules(transformer=before)
    return video


def probe_stream(loaded: CausalVideoPipeline) -> Tensor:
    """Latents [B, C, F, h, w] that a loaded export streams from the probe."""
    chunks = probe_chunks(loaded.settings)
    layout = loaded.settings.layout.extended(chunks)
    held = probe_controls(loaded, layout.frames)
    actions = None if held is None else held.split(layout.lengths, dim=2)
    session = loaded.open(list(WanFamily.probe_prompts), seed=PROBE_SEED, decode=False)
    return torch.cat([output.latents for output in session.stream(chunks, actions)], dim=2)


def probe_controls(pipeline: CausalVideoPipeline, frames: int) -> Tensor | None:
    """Channels [B, K, F, h, w] that the probe gets, each at its own pace from 0 to 1; None for a student of text."""
    channels, (_, height, width) = pipeline.network.extra_channels, pipeline.latent_size()
    if channels == 0:
        return None
    paces = torch.arange(1, channels + 1, device=pipeline.device)[:, None]
    values = (paces * torch.arange(frames, device=pipeline.device) % 5).float() / 4
    return spread(values[None].expand(len(WanFamily.probe_prompts), -1, -1), height, width)


@torch.no_grad()
def stock_difference(draft: Path, student: CausalWan, latents: Tensor) -> float:
    """The transformer as diffusers loads and calls it, against the student without a causal mask; of the largest."""
    stock = WanTransformer3DModel.from_pretrained(draft / "transformer", dtype=torch.float32)
    nn.Module.to(stock, latents.device).eval()
    t = torch.linspace(0.2, 0.8, len(latents), device=latents.device)
    width = stock.config["text_dim"]
    text = torch.linspace(-1, 1, 8 * width, device=latents.device).view(1, 8, width).expand(len(latents), -1, -1)
    batch, _, frames, height, width = latents.shape
    extra = torch.linspace(0, 1, student.extra_channels * frames, device=latents.device).view(-1, frames)
    extra = spread(extra[None].expand(batch, -1, -1), height, width)
    shown = latents
    if features_of(student.transformer) is None:
        shown = torch.cat([latents, extra], dim=1)
    else:
        # Stock diffusers leaves what is told to the layers out, as zeros do.
        extra = torch.zeros_like(extra)
    called = stock(shown, TIME_SCALE * t, text, return_dict=False)[0]
    return relative_difference(called, student.bidirectional(latents, t, text, extra=extra))


@torch.no_grad()
def far_difference(draft: Path, student: CausalWan, latents: Tensor) -> float:
    """The transformer as diffusers' causal class loads and calls it, on clean context from each time to a smaller one,
    against the student of two times that sees all of the past; of the largest."""
    stock = AnyFlowFARTransformer3DModel.from_pretrained(draft / "transformer", dtype=torch.float32)
    nn.Module.to(stock, latents.device).eval()
    layout = ChunkLayout(tuple(stock.config["chunk_partition"]))
    # A corner of the frames says all of the weights; diffusers' attention of the whole would be one matrix.
    clean = latents[:, :, : layout.frames, :COMPARED_SIDE, :COMPARED_SIDE]
    t = torch.linspace(0.2, 0.8, len(clean), device=clean.device)[:, None].expand(-1, layout.frames)
    noisy, width = clean.flip(0, 2), stock.config["text_dim"]
    text = torch.linspace(-1, 1, 8 * width, device=clean.device).view(1, 8, width).expand(len(clean), -1, -1)
    mask = masks.teacher_forcing(layout, student.tokens_per_frame(clean), KEEP_ALL, device=clean.device)
    called = stock(
        noisy.transpose(1, 2),
        TIME_SCALE * t,
        TIME_SCALE * t / 2,
        text,
        chunk_partition=list(layout.lengths),
        clean_hidden_states=clean.transpose(1, 2),
        clean_timestep=torch.zeros_like(t),
        return_dict=False,
    )[0]
    own = student(packed_call(clean, noisy, t, text, mask=mask, r=t / 2)).velocity
    return relative_difference(called.transpose(1, 2), own)


def check_verification(found: Verification, stock: float, dtype: str) -> None:
    """Raise ExportMismatchError where a difference is larger than allowed, or not a number."""
    for what, difference, allowed in (
        ("the stream of the export and the rollout of the training", found.sampler_difference, found.sampler_tolerance),
        (f"the weights as stored ({dtype}) and as trained", found.rounding_difference, found.rounding_tolerance),
        ("the transformer in stock diffusers and the student that sees what it does", stock, STOCK_TOLERANCE),
    ):
        if not difference <= allowed:
            raise ExportMismatchError(f"{what} differ by {difference:.3e} of the largest value (allowed {allowed:.0e})")
