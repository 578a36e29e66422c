"""The recorded table of the families: `python -m tests.core.families.table --output assets/benchmarks/families.json`.

Each number is a difference, of the largest number of what it is compared with: on tiny random models of the stock
classes, on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fewstep.core.export.adapters import write_adapters
from fewstep.core.teacher import Teacher
from tests.core.families import checks
from tests.core.families.checks import TinyModel
from tests.core.families.test_families_cogvideox import LARGE, SMALL
from tests.core.families.test_families_cosmos import MODEL as COSMOS
from tests.core.families.test_families_dit import MODEL as DIT
from tests.core.families.test_families_flux import MODEL as FLUX
from tests.core.families.test_families_flux2 import DEV, DEV_PICTURE, KLEIN, KLEIN_PICTURE
from tests.core.families.test_families_flux_kontext import MODEL as KONTEXT
from tests.core.families.test_families_hunyuan_video import MODEL as HUNYUAN_VIDEO
from tests.core.families.test_families_ltx import MODEL as LTX
from tests.core.families.test_families_pixart import INDICES
from tests.core.families.test_families_pixart import MODEL as PIXART
from tests.core.families.test_families_qwen_image import MODEL as QWEN_IMAGE
from tests.core.families.test_families_qwen_image_edit import EDIT_MODEL, PLUS_MODEL
from tests.core.families.test_families_wan_experts import PICTURE, TEXT
from tests.core.families.test_families_wan_image import MODEL as WAN_IMAGE
from tests.core.families.test_families_wan_image import TI2V
from tests.core.families.test_families_z_image import MODEL as Z_IMAGE
from tests.tiny_pipelines import build_sd3, build_sd15, build_sdxl
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

# The model as people call it, its tiny one, the file of its family and of its test.
PICTURE_SIZE: dict[str, Any] = {"height": 16, "width": 16}
VIDEO_SIZE: dict[str, Any] = {"height": 32, "width": 32, "frames": 9}
MODELS: dict[str, tuple[TinyModel, str, str]] = {
    "Stable Diffusion 1.5": (TinyModel(build_sd15, PICTURE_SIZE, indices=INDICES), "unet", "unet"),
    "Stable Diffusion 2.1": (
        TinyModel(lambda: build_sd15(prediction_type="v_prediction"), PICTURE_SIZE, indices=INDICES),
        "unet",
        "unet",
    ),
    "Stable Diffusion XL": (TinyModel(build_sdxl, PICTURE_SIZE, indices=INDICES), "unet", "unet"),
    "Stable Diffusion 3": (TinyModel(lambda: build_sd3(with_t5=True), PICTURE_SIZE), "sd3", "sd3"),
    "Stable Diffusion 3.5": (TinyModel(lambda: build_sd3(sd35=True, with_t5=True), PICTURE_SIZE), "sd3", "sd3"),
    "SANA": (TinyModel(build_sana, {"height": 32, "width": 32}), "sana", "sana"),
    "Wan 2.1 T2V": (TinyModel(lambda: build_video_pipeline(text_tokens=8), VIDEO_SIZE), "wan", "wan"),
    "Wan 2.2 TI2V-5B": (
        TinyModel(lambda: build_video_pipeline(text_tokens=8, expand_timesteps=True), VIDEO_SIZE),
        "wan",
        "wan",
    ),
    "FLUX.1 (dev, schnell)": (FLUX, "flux", "flux"),
    "FLUX.2 dev": (DEV, "flux2", "flux2"),
    "FLUX.2 klein": (KLEIN, "flux2", "flux2"),
    "FLUX.1 Kontext": (KONTEXT, "flux_kontext", "flux_kontext"),
    "FLUX.2 dev, told a picture": (DEV_PICTURE, "flux2", "flux2"),
    "FLUX.2 klein, told a picture": (KLEIN_PICTURE, "flux2", "flux2"),
    "Qwen-Image": (QWEN_IMAGE, "qwen_image", "qwen_image"),
    "Qwen-Image-Edit": (EDIT_MODEL, "qwen_image_edit", "qwen_image_edit"),
    "Qwen-Image-Edit-Plus": (PLUS_MODEL, "qwen_image_edit", "qwen_image_edit"),
    "Z-Image": (Z_IMAGE, "z_image", "z_image"),
    "PixArt-Sigma": (PIXART, "pixart", "pixart"),
    "DiT": (DIT, "dit", "dit"),
    "Wan 2.1 I2V": (WAN_IMAGE, "wan_image", "wan_image"),
    "Wan 2.2 TI2V-5B, image mode": (TI2V, "wan_image", "wan_image"),
    "Wan 2.2 A14B T2V": (TEXT, "wan", "wan_experts"),
    "Wan 2.2 A14B I2V": (PICTURE, "wan_image", "wan_experts"),
    "LTX-Video": (LTX, "ltx", "ltx"),
    "HunyuanVideo": (HUNYUAN_VIDEO, "hunyuan_video", "hunyuan_video"),
    "Cosmos Predict 2.5": (COSMOS, "cosmos", "cosmos"),
    "CogVideoX-5b": (LARGE, "cogvideox", "cogvideox"),
    "CogVideoX-2b": (SMALL, "cogvideox", "cogvideox"),
}
# Times that bf16 does not round, whose column would be of other times else.
EXACT_TIMES = torch.tensor([0.25, 0.5])
GRIDS = ((1, "ode"), (2, "ode"), (2, "sde"), (4, "ode"), (4, "sde"))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def write_model(pipeline: Any, folder: Path, **arguments: Any) -> Path:
    """A model on disk without the stand-in of a guardrail."""
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
    pipeline.save_pretrained(folder, safe_serialization=True, **arguments)
    return folder


def velocity_of(model: TinyModel, teacher: Teacher) -> torch.Tensor:
    x_t = checks.noise_of(model.shape(teacher), len(model.prompts))
    with torch.no_grad():
        return teacher.denoiser(x_t, EXACT_TIMES, checks.told(model, teacher)).float()


def in_bf16(model: TinyModel, full: Path) -> float:
    """The velocity of a bf16 network, told times and a guidance that bf16 does not round."""
    source = model.source(full)
    if Teacher.load(source).family.told_guidance is not None:
        source = dataclasses.replace(source, embedded_guidance=4.0)
    exact, half = (Teacher.load(source, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    return checks.distance(velocity_of(model, half), velocity_of(model, exact))


def checkpoints_of(model: TinyModel, full: Path, root: Path) -> dict[str, float | None]:
    """Velocities from other kinds of checkpoints against those from the full one."""
    expected = velocity_of(model, Teacher.load(model.source(full)))
    write_model(model.build(), root / "sharded", max_shard_size="20KB")
    half = model.build()
    half.to(torch.float16)
    write_model(half, root / "variant", variant="fp16")
    found: dict[str, float | None] = {
        "sharded": checks.distance(velocity_of(model, Teacher.load(model.source(root / "sharded"))), expected),
        "fp16_variant": checks.distance(velocity_of(model, Teacher.load(model.source(root / "variant"))), expected),
        "bf16": in_bf16(model, full),
        "lora": None,
    }
    teacher = Teacher.load(model.source(full))
    network, family = teacher.denoiser.network, teacher.family
    if not hasattr(teacher.pipeline, "load_lora_weights") or len(family.parts(network)) > 1:
        return found
    adapted = checks.adapted_network(teacher)
    write_adapters(teacher, adapted, root / "lora", dtype=torch.float32)
    merged = Teacher.load(dataclasses.replace(model.source(full), lora=str(root / "lora")))
    found["lora"] = checks.distance(
        velocity_of(model, merged), velocity_of(model, teacher.with_denoiser(type(teacher.denoiser)(adapted, family)))
    )
    return found


def row_of(name: str, repository: Path) -> dict[str, Any]:
    """All figures of one model."""
    model, file, test = MODELS[name]
    # SANA has kinks, between which the differences of this check do not stay: tests/core/tangents has smaller ones.
    state, time = (None, None) if name == "SANA" else checks.tangent_errors(model)
    stock, ours = checks.network_times(model, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        full = write_model(model.build(), root / "model")
        exports = {}
        for steps, sampler in GRIDS:
            times = model.times(steps, Teacher.load(model.source(full)))
            record = checks.export_student(model, full, root / f"{steps}{sampler}", times, sampler)
            assert record.verification is not None
            exports[f"{steps} {sampler}"] = record.verification.sampler_difference
        checkpoints = checkpoints_of(model, full, root)
    return {
        "model": name,
        "pipeline": type(model.build()).__name__,
        "trajectory": checks.trajectory_difference(model),
        "guidance": model.guidance,
        "batch_against_alone": checks.alone_difference(model),
        "tangent_state": state,
        "tangent_time": time,
        "bf16_times_equal": stock == ours,
        "exports": exports,
        "checkpoints": checkpoints,
        "family_lines": lines_of(repository / "core" / "families" / f"{file}.py"),
        "test_lines": lines_of(repository / "tests" / "core" / "families" / f"test_families_{test}.py"),
    }


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="file to write, .json")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="names of models; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        rows.append(row_of(name, Path(__file__).resolve().parents[3]))
        print(json.dumps(rows[-1]))
    record = {
        "command": "python -m tests.core.families.table --output assets/benchmarks/families.json",
        "versions": {library: version(library) for library in ("torch", "diffusers", "transformers", "peft")},
        "rows": rows,
    }
    Path(options.output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
