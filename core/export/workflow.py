"""An export for ComfyUI: its network in one file, and a workflow that steps where the student was trained to step.

The workflow has ComfyUI's API format (drop the file on its page) and nodes of ComfyUI's own. The sigmas stand in it,
"lcm" re-noises the predicted x0 and "euler" follows the velocity; with the basic guider there is no second network
call.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from fewstep.core.export.comfyui import FOLDER
from fewstep.core.export.contract import own_size
from fewstep.core.export.original_names import original_state
from fewstep.core.export.record import ExportRecord, read_record
from fewstep.core.families.parts.noise_table import noise_table

# What a user has in ComfyUI's folders: a checkpoint with text encoders and autoencoder, by kind of pipeline.
CHECKPOINTS = {
    "StableDiffusionPipeline": "v1-5-pruned-emaonly.safetensors",
    "StableDiffusionXLPipeline": "sd_xl_base_1.0.safetensors",
    "StableDiffusion3Pipeline": "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
}
FAMILIES = {**dict.fromkeys(CHECKPOINTS, "unet"), "StableDiffusion3Pipeline": "sd3", "WanPipeline": "wan"}
WAN_TEXT, WAN_VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
# ComfyUI reads no exponents, and 8 digits are more than fp32 has.
DIGITS = 8
# Below this a table ends in pure noise, which ComfyUI counts in a way of its own.
SMALLEST_SHARE = 1e-8
FRAMES_PER_SECOND = 16

Nodes = dict[str, dict[str, Any]]


def write_comfyui_files(export: str | Path) -> list[Path]:
    """Write `comfyui/workflow.json` into an export, and for merged weights the network as one file beside it.

    Adapters have a file of their own there already. Nothing is written for a pipeline or a grid that ComfyUI's own
    nodes do not have. Returns the new files.

    Raises:
        ValueError: the network has weights that its original form has not.
    """
    export = Path(export)
    record, written = read_record(export), []
    sigmas, adapters = comfyui_sigmas(export, record), export / FOLDER / "lora.safetensors"
    if sigmas is None or (record.weights == "lora" and not adapters.is_file()):
        return written
    settings = json.loads((export / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    prediction = settings.get("prediction_type")
    folder = export / FOLDER
    folder.mkdir(exist_ok=True)
    if record.weights == "merged":
        family = FAMILIES[record.pipeline]
        name = "unet" if family == "unet" else "transformer"
        index = json.loads((export / "model_index.json").read_text(encoding="utf-8"))
        kind = getattr(diffusers, index[name][1])
        network = kind.from_pretrained(export / name, torch_dtype=getattr(torch, record.dtype))
        state = original_state(network, family)
        assert state is not None, "the pipeline is one of those whose families have original names"
        partial = folder / ".diffusion_model.partial"
        save_file(state, partial, metadata={"format": "pt"})
        written.append(partial.replace(folder / "diffusion_model.safetensors"))
    partial = folder / ".workflow.partial"
    partial.write_text(
        json.dumps(comfyui_workflow(_sized(export, record), sigmas, prediction=prediction), indent=1) + "\n",
        encoding="utf-8",
    )
    written.append(partial.replace(folder / "workflow.json"))
    return written


def _sized(export: Path, record: ExportRecord) -> ExportRecord:
    """The record with the pixels of its pictures, which it leaves to the pipeline where they are the pipeline's own."""
    if record.height is not None and record.width is not None:
        return record
    if record.weights == "lora":
        # Their model is not here: what most of these models draw by themselves.
        height = width = 512 if record.pipeline == "StableDiffusionPipeline" else 1024
    else:
        height, width = own_size(export)
    return replace(record, height=height, width=width)


def comfyui_sigmas(export: Path, record: ExportRecord) -> tuple[float, ...] | None:
    """Standard deviations of the noise as ComfyUI counts them: t itself for rectified flow, sigma / alpha on a table.

    None for other pipelines, and for a table's grid that does not start at its end, or ends in pure noise: ComfyUI
    starts at its end alone with noise of variance 1.
    """
    family = FAMILIES.get(record.pipeline)
    if family is None:
        return None
    if family != "unet":
        return record.times
    scheduler = getattr(diffusers, record.scheduler).from_pretrained(export, subfolder="scheduler")
    table = noise_table(scheduler).alphas_cumprod
    kept = [float(table[round(step)]) for step in record.network_timesteps]
    if round(record.network_timesteps[0]) != len(table) - 1 or kept[0] < SMALLEST_SHARE:
        return None
    return tuple(math.sqrt((1.0 - share) / share) for share in kept)


def comfyui_workflow(record: ExportRecord, sigmas: tuple[float, ...], *, prediction: str | None = None) -> Nodes:
    """Nodes by number. Files are named after the record, as they would be called in ComfyUI's folders.

    `prediction` is that of a U-Net, as its scheduler says.
    """
    nodes: Nodes = {}

    def add(kind: str, **inputs: Any) -> list[Any]:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(nodes)), 0]

    is_wan, name = record.pipeline == "WanPipeline", f"{record.name}.safetensors"
    if is_wan:
        clip = add("CLIPLoader", clip_name=WAN_TEXT, type="wan", device="default")
        vae = add("VAELoader", vae_name=WAN_VAE)
        model = None
    else:
        model = add("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS[record.pipeline])
        clip, vae = [model[0], 1], [model[0], 2]
    if record.weights == "merged":
        model = add("UNETLoader", unet_name=name, weight_dtype="default")
    else:
        if model is None:
            base = f"{record.base_model.rpartition('/')[2]}.safetensors"
            model = add("UNETLoader", unet_name=base, weight_dtype="default")
        model = add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
    if prediction == "v_prediction":
        # ComfyUI takes a U-Net of these shapes for one of epsilon.
        model = add("ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=False)
    size: dict[str, Any] = {"width": record.width, "height": record.height, "batch_size": 1}
    if is_wan:
        latent = add("EmptyHunyuanLatentVideo", length=record.num_frames, **size)
    else:
        is_sd3 = record.pipeline == "StableDiffusion3Pipeline"
        latent = add("EmptySD3LatentImage" if is_sd3 else "EmptyLatentImage", **size)
    shown = ", ".join(f"{sigma:.{DIGITS}f}" for sigma in (*sigmas, 0.0))
    sampled = add(
        "SamplerCustomAdvanced",
        noise=add("RandomNoise", noise_seed=0),
        guider=add("BasicGuider", model=model, conditioning=add("CLIPTextEncode", text="a prompt", clip=clip)),
        sampler=add("KSamplerSelect", sampler_name="lcm" if record.sampler == "sde" else "euler"),
        sigmas=add("ManualSigmas", sigmas=shown),
        latent_image=latent,
    )
    pixels = add("VAEDecode", samples=sampled, vae=vae)
    if is_wan:
        how = {"fps": FRAMES_PER_SECOND, "lossless": False, "quality": 90, "method": "default"}
        add("SaveAnimatedWEBP", images=pixels, filename_prefix=record.name, **how)
    else:
        add("SaveImage", images=pixels, filename_prefix=record.name)
    return nodes
