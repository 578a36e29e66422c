"""Whole runs on families whose models are told more than text: trained from their settings, exported from their run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline

from fewstep.core.export.contract import stored_call
from fewstep.core.export.record import read_record
from fewstep.core.export.run import ExportFiles, export_run
from fewstep.core.networks.adapters import merge_stored_adapters
from fewstep.core.run_settings import read_settings
from fewstep.core.teacher import Teacher
from fewstep.core.weights import find_weights, load_weights
from fewstep.dmd.train import train_dmd
from tests.core.families.checks import TinyModel
from tests.core.families.test_families_dit import MODEL as DIT
from tests.core.families.test_families_flux import MODEL as FLUX
from tests.core.families.test_families_wan_experts import TEXT as EXPERTS
from tests.core.families.test_families_wan_image import TI2V
from tests.dmd.tiny_run import PROMPTS, TinyInputs, tiny_config
from tests.test_bf16_matrix import write_pictures

BOTH = ("transformer.", "transformer_2.")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]


def trained(model: TinyModel, folder: Path, changes: dict[str, Any]) -> Path:
    """The directory of a run of two steps."""
    (folder / "prompts.txt").write_text("\n".join(changes.pop("prompts", PROMPTS)) + "\n", encoding="utf-8")
    inputs = TinyInputs(folder / "model", folder / "prompts.txt", folder / "latents", folder / "pairs")
    size = {f"data.{name}": value for name, value in model.size.items()}
    config = tiny_config(inputs, folder / "run", {"run.steps": 2, "student.steps": 2, **size, **changes})
    assert train_dmd(config) == 0
    return folder / "run"


def test_an_embedded_guidance_is_trained_and_called(tmp_path: Path) -> None:
    FLUX.build().save_pretrained(tmp_path / "model")
    told = {"teacher.embedded_guidance": 2.0, "teacher.guidance": 1.0}
    run = trained(FLUX, tmp_path, told)
    assert read_settings(run).base.embedded_guidance == 2.0
    folder, record = export_run(run)
    assert record.guidance_call == {"guidance_scale": 2.0}
    call = stored_call(folder)
    assert call is not None
    assert (call["guidance_scale"], call["num_inference_steps"], call["max_sequence_length"]) == (2.0, 2, 24)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("the network is told 2, at which it was trained") == 1


def test_the_image_mode_of_a_text_model_is_trained_with_pictures(tmp_path: Path) -> None:
    image = TI2V.build()
    parts: dict[str, Any] = {name: getattr(image, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    WanPipeline(**parts, transformer=image.transformer, expand_timesteps=True).save_pretrained(tmp_path / "model")
    pictures = write_pictures(tmp_path / "pictures", len(PROMPTS))
    asked = {"teacher.pipeline": "WanImageToVideoPipeline", "data.pictures": str(pictures)}
    run = trained(TI2V, tmp_path, asked)
    folder, record = export_run(run)
    assert record.pipeline == "WanImageToVideoPipeline"
    assert record.verification is not None
    assert record.verification.sampler_difference < 3e-5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("image=picture") == 1
    assert type(DiffusionPipeline.from_pretrained(folder)) is WanImageToVideoPipeline


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.pipeline": "WanImageToVideoPipeline"}, "is told a picture beside the text: set data.pictures"),
        ({"data.pictures": "two"}, "holds 2 pictures for 5 prompts"),
        ({"data.pictures": "five"}, "is told no picture: leave it out"),
        ({"data.pictures": "none"}, "there is no directory"),
        ({"teacher.embedded_guidance": 3.0}, "has no embedding of a guidance"),
        ({"teacher.guidance_low": 3.0}, "has no second expert"),
    ],
)
def test_settings_of_another_model_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    image = TI2V.build()
    parts: dict[str, Any] = {name: getattr(image, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    WanPipeline(**parts, transformer=image.transformer, expand_timesteps=True).save_pretrained(tmp_path / "model")
    write_pictures(tmp_path / "two", 2)
    write_pictures(tmp_path / "five", 5)
    if "data.pictures" in changes:
        changes = {"data.pictures": str(tmp_path / changes["data.pictures"])}
    with pytest.raises(ValueError, match=message):
        trained(TI2V, tmp_path, dict(changes))


def experts_of(model: Path, source: Path | None) -> dict[str, torch.Tensor]:
    """The weights of two experts that a run which starts from this source has, its adapters merged."""
    network = Teacher.load(model).denoiser.network
    if source is not None:
        stored = find_weights(str(source))
        (merge_stored_adapters if stored.holds_adapters else load_weights)(network, stored)
    return network.state_dict()


@pytest.mark.parametrize("lora_only", [False, True])
def test_adapters_of_two_experts_are_trained_and_exported(tmp_path: Path, lora_only: bool) -> None:
    EXPERTS.build().save_pretrained(tmp_path / "model")
    adapters = {"student.lora_rank": 2, "fake_score.lora_rank": 2, "student.steps": 4, "student.shift": 5.0}
    # Enough steps for the calls that learn to be of both experts.
    adapters |= {"run.steps": 8, "fake_score.ratio": 1}
    run = trained(EXPERTS, tmp_path, {**adapters, "teacher.guidance_low": 1.5})
    folder, record = export_run(run, files=ExportFiles(lora_only=lora_only))
    assert record.verification is not None
    assert record.verification.sampler_difference < 3e-5
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == (["pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"] if lora_only else [])
    # Another run goes on from the export as from the run.
    ours, theirs, plain = (experts_of(tmp_path / "model", source) for source in (run, folder, None))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-6
    assert all(
        any(name.startswith(part) and not torch.equal(ours[name], plain[name]) for name in ours) for part in BOTH
    )
    if not lora_only:
        opened: list[Any] = [WanPipeline.from_pretrained(place) for place in (folder, tmp_path / "model")]
        for name in ("transformer", "transformer_2"):
            new, old = (getattr(pipeline, name).state_dict() for pipeline in opened)
            moved = [key for key, weight in new.items() if not torch.equal(weight, old[key])]
            assert any(".attn1.to_q.weight" in key for key in moved), name


def test_a_class_is_a_prompt(tmp_path: Path) -> None:
    DIT.build().save_pretrained(tmp_path / "model")
    run = trained(DIT, tmp_path, {"prompts": ("207", "3", "15"), "student.timesteps": (999.0, 499.0)})
    folder, record = export_run(run)
    assert read_record(folder).call_arguments() == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert record.network_timesteps == (999, 499)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("class_labels=[207]") == 1
