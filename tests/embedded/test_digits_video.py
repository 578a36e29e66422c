"""The shipped video teacher: complete, small, and loaded by plain diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from fewstep.core.data import LatentDataset, read_prompts
from fewstep.core.teacher import Teacher
from fewstep.embedded.moving_digits.autoencoder import scaled_video_latents
from fewstep.embedded.moving_digits.clips import all_clip_captions, moving_digits

ASSET = Path(__file__).resolve().parents[2] / "assets" / "digits_video"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.load(ASSET)


def test_asset_is_complete_and_small() -> None:
    files = [path for path in ASSET.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24 * MEBIBYTE
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl")]
    assert (ASSET / "README.md").stat().st_size > 500
    assert read_prompts(ASSET / "prompts.txt") == tuple(all_clip_captions())
    record = json.loads((ASSET / "training.json").read_text(encoding="utf-8"))
    assert record["log"]["transformer"][-1]["step"] == record["recipe"]["transformer_steps"]


def test_plain_diffusers_loads_and_runs_it(teacher: Teacher) -> None:
    stock: Any = DiffusionPipeline.from_pretrained(ASSET)
    assert type(stock) is WanPipeline
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 8, 7, 8, 8, generator=torch.Generator().manual_seed(0))
    size: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 25, "max_sequence_length": 16}
    prompt = "a seven moving left quickly"
    output: Any = stock(prompt, latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="pt", **size)
    video = output.frames
    assert video.shape == (1, 25, 3, 32, 32)
    latents = teacher.sample(noise, teacher.encode([prompt]), steps=2, guidance=2.0)
    assert (teacher.decode(latents).transpose(1, 2) - video).abs().max() < 1e-4


def test_sizes(teacher: Teacher) -> None:
    parameters = sum(parameter.numel() for parameter in teacher.denoiser.parameters())
    assert 1_500_000 < parameters < 4_000_000
    assert teacher.latent_shape(32, 32, frames=25) == (8, 7, 8, 8)
    assert teacher.null_condition.text.shape == (1, 16, 64)
    network: Any = teacher.denoiser.network
    assert network.config["rope_max_seq_len"] == 1024


@pytest.mark.slow
def test_autoencoder_reconstructs_held_out_clips(teacher: Teacher) -> None:
    pixels = moving_digits("test", seed=4, indices=range(8), frames=49).pixels
    latents = teacher.encode_pixels(pixels)
    assert latents.shape == (8, 8, 13, 8, 8)
    error = (teacher.decode(latents) - pixels).pow(2).mean(dim=(0, 1, 3, 4))
    decibels = -10 * error.log10()
    assert -10 * error.mean().log10() > 26.0
    # It was trained on 25 frames; those after them are no worse.
    assert decibels[25:].mean() > decibels[:25].mean() - 2.0


def test_train_latents_are_what_the_encoder_makes(teacher: Teacher) -> None:
    dataset = LatentDataset.load(ASSET / "train_latents")
    assert dataset.latents.shape == (1200, 8, 7, 8, 8)
    assert dataset.latents.float().mean().abs() < 0.05
    assert dataset.latents.float().std() == pytest.approx(1.0, abs=0.05)
    clips = moving_digits("train", seed=0, indices=range(1_000_000, 1_000_004))
    assert dataset.prompts[:4] == clips.captions
    pipeline: Any = teacher.pipeline
    made = scaled_video_latents(pipeline.vae, clips.pixels)
    assert (made - dataset.latents[:4].float()).abs().max() < 1e-2
    assert (teacher.encode_pixels(clips.pixels) - made).abs().max() < 1e-5
