"""Teachers that do not fit are refused from their JSON files; the files that there are get read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler

from fewstep.core.families.table import RELATIVES, configs_of, require_known_class
from fewstep.core.settings import ModelSource
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import check_teacher
from tests.core.stub_hub import stub_hub
from tests.tiny_pipelines import LATENT_SHAPE, build_sd3, build_sd15, build_sdxl, save_pipeline
from tests.tiny_sana import build_sana
from tests.tiny_videos import build_video_pipeline

Files = dict[str, Any]
BUILDERS: dict[str, Callable[[], Any]] = {
    "sd15": build_sd15,
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "sana": build_sana,
    "wan": build_video_pipeline,
}
# kind: (the pipeline it is made of, the file that is changed, the change, what is said)
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "unknown": ("sd3", "model_index.json", {"_class_name": "PiaPipeline"}, "no family for the pipeline class PiaPip"),
    "fill": ("sd3", "model_index.json", {"_class_name": "FluxFillPipeline"}, "FluxFillPipeline is no teacher here"),
    "lcm": ("sd15", "unet/config.json", {"time_cond_proj_dim": 256}, "an input for the guidance .time_cond_proj_dim"),
    "lcm scheduler": ("sdxl", "scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "few-step student"),
    "edm": ("sdxl", "scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "DDPM table of betas"),
    "inpainting": ("sd15", "unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4: it is told a pict"),
    "classes": ("sd15", "unet/config.json", {"num_class_embeds": 10}, "is told a class .num_class_embeds 10"),
    "class embedding": ("sd15", "unet/config.json", {"class_embed_type": "timestep"}, "is told a class"),
    "image embedding": ("sdxl", "unet/config.json", {"addition_embed_type": "image"}, "null or text_time, got 'image'"),
    "zero snr": ("sd15", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    "sample": ("sd15", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "must be epsilon or v_pred"),
    "no scale": ("sdxl", "vae/config.json", {"scaling_factor": None}, "scaling_factor is None"),
    "zero scale": ("sd3", "vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0"),
    "sd3 of ddim": ("sd3", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "SD3 needs a FlowMat"),
    "no shift": ("sd3", "scheduler/scheduler_config.json", {"shift": 0.0}, "the shift 0.0, and it must be positive"),
    "dynamic": ("sd3", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "follows from the steps"),
    "sd3 of pictures": ("sd3", "transformer/config.json", {"in_channels": 33}, "takes 33 channels and gives"),
    "two experts": ("wan", "model_index.json", {"boundary_ratio": 0.9}, "two switch there"),
    "image to video": ("wan", "transformer/config.json", {"in_channels": 36}, "takes 36 channels and gives"),
    "image tokens": ("wan", "transformer/config.json", {"image_dim": 1280}, "image_dim 1280: it is told an image"),
    "wan of ddim": ("wan", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "Wan needs a Flow"),
    "sana of ddim": ("sana", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "SANA needs a Fl"),
}
ASK = """
import json, sys
from fewstep.core.settings import ModelSource
from fewstep.core.teacher import Teacher
from fewstep.core.teacher_files import check_teacher
found = {}
for name in json.loads(sys.argv[1]):
    try:
        check_teacher(ModelSource(path=name)) if name.startswith("good/") else Teacher.load(name)
        found[name] = "accepted"
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def jsons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """The JSON files of each pipeline by their names in it."""
    found: dict[str, Files] = {}
    for name, build in BUILDERS.items():
        folder = save_pipeline(build(), tmp_path_factory.mktemp(name) / name)
        files = {str(file.relative_to(folder)): json.loads(file.read_text()) for file in folder.glob("**/*.json")}
        found[name] = files
    return found


def spoiled(files: Files, name: str, change: dict[str, Any]) -> Files:
    return {**files, name: {**files[name], **change}}


def test_refusals_on_the_hub_fetch_json_alone(jsons: dict[str, Files], tmp_path: Path) -> None:
    repositories = {f"good/{name}": files for name, files in jsons.items()}
    names = {kind: f"bad/{kind.replace(' ', '-')}" for kind in REFUSED}
    for kind, (base, file, change, _) in REFUSED.items():
        repositories[names[kind]] = spoiled(jsons[base], file, change)
    with stub_hub(repositories) as (endpoint, asked):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        arguments = [sys.executable, "-c", ASK, json.dumps([*repositories, "bad/nothing"])]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert [said[f"good/{name}"] for name in jsons] == ["accepted"] * len(jsons)
    for kind, (_, _, _, message) in REFUSED.items():
        assert message.replace(" .", " (") in said[names[kind]] or message in said[names[kind]], (
            kind,
            said[names[kind]],
        )
    assert "HF_TOKEN" in said["bad/nothing"]
    assert len(asked) > len(REFUSED)
    assert {path.rpartition(".")[2] for path in asked} == {"json"}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_refusals_in_a_folder_come_before_its_weights(jsons: dict[str, Files], tmp_path: Path, kind: str) -> None:
    """Folders with JSON files alone: with a right config the next thing that is said is that weights are missing."""
    base, file, change, message = REFUSED[kind]
    for name, content in spoiled(jsons[base], file, change).items():
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        check_teacher(ModelSource(path=str(tmp_path)))
    (tmp_path / file).write_text(json.dumps(jsons[base][file]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"component \w+ \(\w+\)"):
        check_teacher(ModelSource(path=str(tmp_path)))


@pytest.mark.parametrize("component", ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("entry", [[None, None], [], None])
def test_a_component_that_is_not_there_is_named(
    jsons: dict[str, Files], tmp_path: Path, component: str, entry: Any
) -> None:
    for name, content in jsons["sd3"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    index = {**jsons["sd3"]["model_index.json"], component: entry}
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has no {component}"):
        check_teacher(ModelSource(path=str(tmp_path)))


def test_a_loaded_pipeline_is_held_to_the_same() -> None:
    pipeline = build_sd15()
    assert configs_of(pipeline)["scheduler"]["_class_name"] == type(pipeline.scheduler).__name__
    pipeline.unet.register_to_config(time_cond_proj_dim=32)
    with pytest.raises(ValueError, match="an input for the guidance"):
        Teacher(pipeline, path="tiny")


def test_other_kinds_of_files_are_told_what_to_do(tmp_path: Path) -> None:
    folder = save_pipeline(build_sd3(), tmp_path / "model")
    single = tmp_path / "civitai.safetensors"
    single.write_bytes(b"")
    with pytest.raises(ValueError, match=r"civitai\.safetensors is a file.*from_single_file"):
        check_teacher(ModelSource(path=str(single)))
    with pytest.raises(ValueError, match="the folder of one network, and a teacher is the folder above it"):
        check_teacher(ModelSource(path=str(folder / "transformer")))
    with pytest.raises(ValueError, match=r"teacher\.revision is main beside the folder"):
        check_teacher(ModelSource(path=str(folder), revision="main"))
    (folder / "vae" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"vae.config\.json holds a list, and an object was expected"):
        check_teacher(ModelSource(path=str(folder)))


def test_a_folder_of_one_variant_is_read_as_it_is(tmp_path: Path) -> None:
    pipeline = build_sdxl()
    expected = Teacher(build_sdxl(), path="tiny")
    pipeline.save_pretrained(tmp_path / "pack" / "half", variant="fp16")
    for source in (
        ModelSource(path=str(tmp_path / "pack" / "half")),
        ModelSource(path=str(tmp_path / "pack"), subfolder="half", variant="fp16"),
    ):
        check_teacher(source)
        teacher = Teacher.load(source)
        noise, condition = torch.randn(1, *LATENT_SHAPE), teacher.encode(["a cat"])
        t = torch.tensor([0.5])
        assert torch.equal(teacher.velocity(noise, t, condition, 3.0), expected.velocity(noise, t, condition, 3.0))
    wrong = ModelSource(path=str(tmp_path / "pack" / "half"), variant="bf16")
    with pytest.raises(ValueError, match=r"has the weights of fp16 alone, and teacher\.variant is bf16"):
        check_teacher(wrong)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_negative_prompt_is_what_guidance_leads_away_from(name: str) -> None:
    teacher = Teacher(BUILDERS[name](), path="tiny", negative_prompt="two dogs")
    plain = Teacher(BUILDERS[name](), path="tiny")
    size = (32, 32) if name == "wan" else (None, None)
    shape = teacher.latent_shape(*size, frames=5 if name == "wan" else None)
    x, t, condition = torch.randn(1, *shape), torch.tensor([0.6]), teacher.encode(["a red cat"])
    away = teacher.denoiser(x, t, teacher.encode(["two dogs"]))
    towards = teacher.denoiser(x, t, condition)
    torch.testing.assert_close(
        teacher.velocity(x, t, condition, 3.0), away + 3.0 * (towards - away), rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(teacher.velocity(x, t, condition, 3.0), plain.velocity(x, t, condition, 3.0))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_with_v_is_stock_ddim(scheduler: Any) -> None:
    """At the last entry alpha is zero: x0 is -v of the pure noise."""
    pipeline = build_sd15(prediction_type="v_prediction")
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **changes)
    teacher = Teacher(pipeline, path="tiny")
    stock: Any = build_sd15(prediction_type="v_prediction")
    ddim: Any = DDIMScheduler.from_config(stock.scheduler.config, **changes)
    stock.scheduler = ddim
    assert float(ddim.alphas_cumprod[-1]) == 0
    noise, condition = torch.randn(1, *LATENT_SHAPE), teacher.encode(["a red cat"])
    stock.set_progress_bar_config(disable=True)
    for steps in (1, 4):
        expected = stock(
            "a red cat", latents=noise, num_inference_steps=steps, guidance_scale=3.0, output_type="latent"
        )
        ours = teacher.sample(noise, condition, steps=steps, guidance=3.0)
        assert (ours - expected.images).abs().max() < 2e-6 * expected.images.abs().max(), steps


@pytest.mark.parametrize("name", sorted(RELATIVES))
def test_relatives_of_known_pipelines_are_refused_with_a_reason_and_a_way_out(name: str) -> None:
    # A class that diffusers has, so that the reason is not one for a name that nobody meets.
    assert issubclass(getattr(diffusers, name), DiffusionPipeline)
    with pytest.raises(ValueError, match=f"{name} is no teacher here: .*(use|name) "):
        require_known_class(name)
