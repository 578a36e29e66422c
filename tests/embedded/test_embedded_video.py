"""The embedded video teacher: its tokenizer and text encoder, and its training code for a few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from fewstep.core.data import LatentDataset, read_prompts
from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.moving_digits.autoencoder import (
    AutoencoderStage,
    build_video_autoencoder,
    scaled_video_latents,
    standardise_latents,
    train_video_autoencoder,
)
from fewstep.embedded.moving_digits.clips import all_clip_captions, moving_digits
from fewstep.embedded.moving_digits.teacher import VideoTeacherRecipe, save_video_teacher, train_video_teacher
from fewstep.embedded.moving_digits.text import (
    build_video_text_encoder,
    build_video_tokenizer,
    clip_caption_targets,
    train_video_text_encoder,
)

RECIPE = VideoTeacherRecipe(
    text_steps=2,
    autoencoder_steps=2,
    long_autoencoder_steps=2,
    statistics_clips=2,
    clips=6,
    short_steps=2,
    transformer_steps=4,
    batch_size=2,
    long_text_every=4,
    saved_clips=3,
)


def test_every_caption_word_is_one_token() -> None:
    tokenizer = build_video_tokenizer()
    for text in all_clip_captions():
        tokens = tokenizer(text).input_ids
        assert len(tokens) == len(text.split()) + 1
        assert tokens[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in tokens
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]


@pytest.mark.parametrize("text", ["An unknown animal, 12!", "caf\u00e9 \u6f22\u5b57 \U0001f600", "x" * 300])
def test_unknown_text_does_not_raise(text: str) -> None:
    tokenizer = build_video_tokenizer()
    tokens = tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    assert tokens.shape == (1, 16)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < len(tokenizer)


def test_text_encoder_learns_to_tell_captions_apart() -> None:
    tokenizer = build_video_tokenizer()
    losses = []
    for steps in (1, 8):
        torch.manual_seed(0)
        encoder = build_video_text_encoder(tokenizer)
        losses.append(train_video_text_encoder(encoder, tokenizer, steps=steps))
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    captions = ["a three moving left slowly", "the digit nine moves quickly up", ""]
    digits, directions, speeds = clip_caption_targets(captions)
    assert (digits.tolist(), directions.tolist(), speeds.tolist()) == ([3, 9, 10], [0, 2, 4], [0, 1, 2])
    assert losses[0] > 4.0
    assert losses[1] < 0.9 * losses[0]


def test_autoencoder_learns_and_standardises() -> None:
    torch.manual_seed(0)
    vae, log = build_video_autoencoder(), StepLog("test", every=1)
    stage = AutoencoderStage(steps=6, frames=5, batch_size=2, learning_rate=2e-3)
    train_video_autoencoder(vae, stage, seed=0, log=log)
    standardise_latents(vae, clips=8, seed=0)
    assert [record["step"] for record in log.records] == list(range(1, 7))
    assert log.records[-1]["mse"] < 0.8 * log.records[0]["mse"]
    latents = scaled_video_latents(vae, moving_digits("train", seed=0, indices=range(8)).pixels)
    assert latents.shape == (8, 8, 7, 8, 8)
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-4
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-4


@pytest.mark.slow
def test_saved_teacher_is_a_stock_pipeline_and_repeats(tmp_path: Path) -> None:
    pipeline, dataset, log = train_video_teacher(RECIPE, tmp_path)
    # The autoencoder of the first run is taken over, as after an interruption.
    written = (tmp_path / "vae" / "config.json").stat().st_mtime_ns
    again, _, _ = train_video_teacher(RECIPE, tmp_path)
    assert (tmp_path / "vae" / "config.json").stat().st_mtime_ns == written
    for name in ("transformer", "text_encoder", "vae"):
        weights = getattr(again, name).state_dict()
        for key, weight in getattr(pipeline, name).state_dict().items():
            assert torch.equal(weight, weights[key]), (name, key)
    save_video_teacher(pipeline, dataset, tmp_path, recipe=RECIPE, log=log)
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is WanPipeline
    assert stock.tokenizer.model_max_length == 16
    stock.set_progress_bar_config(disable=True)
    size: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 25, "max_sequence_length": 16}
    output: Any = stock("a two moving up slowly", num_inference_steps=1, output_type="pt", **size)
    video = output.frames
    assert video.shape == (1, 25, 3, 32, 32)
    assert read_prompts(tmp_path / "prompts.txt") == tuple(all_clip_captions())
    saved = LatentDataset.load(tmp_path / "train_latents")
    assert saved.latents.shape == (3, 8, 7, 8, 8)
    assert saved.latents.dtype == torch.float16
    clips = moving_digits("train", seed=0, indices=range(1_000_000, 1_000_003))
    assert saved.prompts == clips.captions
    assert [label_of_prompt(text) for text in saved.prompts] == clips.labels.tolist()
    assert (saved.latents.float() - scaled_video_latents(again.vae, clips.pixels)).abs().max() < 5e-3
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["recipe"]["transformer_steps"] == 4
    assert not (tmp_path / "autoencoder.json").exists()
    assert not list(tmp_path.rglob("*.bin"))
