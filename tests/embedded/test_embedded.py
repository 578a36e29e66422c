"""The embedded teacher: its digits, captions and tokenizer, and its training code for a few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from fewstep.core.data import LatentDataset, read_prompts
from fewstep.embedded.digits.images import (
    DIGIT_WORDS,
    WEIGHT_WORDS,
    all_captions,
    balanced_prompt,
    caption,
    label_of_prompt,
    load_digits_split,
    weight_of_prompt,
)
from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.digits.teacher import TeacherRecipe, save_teacher, train_teacher, training_captions
from fewstep.embedded.digits.text import build_text_encoder, build_tokenizer, caption_targets, train_text_encoder

RECIPE = TeacherRecipe(text_steps=2, autoencoder_steps=4, transformer_steps=2, batch_size=8)


@pytest.fixture(scope="module")
def trained() -> tuple[StableDiffusion3Pipeline, dict[str, list[dict[str, float]]]]:
    """A pipeline after a few steps of each of its trainings."""
    return train_teacher(RECIPE)


def test_split_is_balanced_and_does_not_overlap() -> None:
    train, test = load_digits_split("train"), load_digits_split("test")
    assert (len(train), len(test)) == (1297, 500)
    assert test.labels.bincount().tolist() == [50] * 10
    assert (train.labels.bincount() + 50).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    seen = {picture.numpy().tobytes() for picture in train.pixels}
    assert len(seen) == 1297
    assert sum(picture.numpy().tobytes() in seen for picture in test.pixels) == 0
    for images in (train, test):
        assert images.pixels.shape == (len(images), 3, 32, 32)
        assert 0.0 <= float(images.pixels.min()) < float(images.pixels.max()) <= 1.0
        assert torch.equal(images.pixels[:, 0], images.pixels[:, 2])
    # Half of the training digits of each class have more ink than its median.
    bold = [float(train.weights[train.labels == digit].float().mean()) for digit in range(10)]
    assert bold == pytest.approx([0.5] * 10, abs=0.05)
    again = load_digits_split("test")
    assert torch.equal(again.pixels, test.pixels)
    assert torch.equal(again.labels, test.labels)
    with pytest.raises(ValueError, match="split is 'all'; use 'train' or 'test'"):
        load_digits_split("all")  # pyright: ignore[reportArgumentType]


def test_captions_name_their_digit_and_weight() -> None:
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 120
    for phrasing in range(4):
        for weight in (None, 0, 1):
            for digit in range(10):
                text = caption(digit, weight=weight, phrasing=phrasing)
                assert captions.index(text) == phrasing * 30 + (0 if weight is None else 1 + weight) * 10 + digit
                assert (label_of_prompt(text), weight_of_prompt(text)) == (digit, weight)
    assert caption(7, weight=1, phrasing=2) == "a bold handwritten seven"
    assert label_of_prompt("The digit NINE") == 9


@pytest.mark.parametrize("prompt", ["a cat", "", "one two", "none of them"])
def test_prompts_without_one_digit_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="must name exactly one digit of zero, one"):
        label_of_prompt(prompt)


def test_evaluation_prompts_are_balanced() -> None:
    prompts = [balanced_prompt(index) for index in range(320)]
    assert torch.tensor([label_of_prompt(text) for text in prompts]).bincount().tolist() == [32] * 10
    weights = [weight_of_prompt(text) for text in prompts]
    assert [weights.count(weight) for weight in (None, 0, 1)] == [160, 80, 80]
    assert len(set(prompts)) == 120


def test_training_captions_describe_their_images() -> None:
    images, rows = load_digits_split("train"), torch.arange(300)
    captions = [all_captions()[row] for row in training_captions(images, rows, torch.Generator().manual_seed(0))]
    assert [label_of_prompt(text) for text in captions] == images.labels[rows].tolist()
    said = [(weight_of_prompt(text), int(images.weights[row])) for row, text in enumerate(captions)]
    assert all(found in (None, true) for found, true in said)
    assert 0.4 < sum(found is None for found, _ in said) / 300 < 0.6


def test_every_caption_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    for text in all_captions():
        tokens = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(tokens) == [
            "<|startoftext|>",
            *(f"{word}</w>" for word in text.split()),
            "<|endoftext|>",
        ]
    assert len({f"{word}</w>" for word in (*DIGIT_WORDS, *WEIGHT_WORDS)} & vocabulary.keys()) == 12
    assert build_tokenizer(pad_token="!").pad_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["", "An unknown animal, 12!", "caf\u00e9 \u6f22\u5b57 \U0001f600", "x" * 300])
def test_unknown_text_falls_back_to_bytes(text: str) -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer(text, padding="max_length", max_length=8, truncation=True, return_tensors="pt").input_ids
    assert tokens.shape == (1, 8)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < len(tokenizer)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    assert (len(whole) > 0) == (len(text) > 0)


def test_text_encoder_learns_to_tell_captions_apart() -> None:
    tokenizer = build_tokenizer()
    losses = []
    for steps in (1, 30):
        torch.manual_seed(0)
        encoder = build_text_encoder(tokenizer)
        losses.append(train_text_encoder(encoder, tokenizer, steps=steps))
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    digits, weights = caption_targets(["a bold three", "the digit nine", ""])
    assert digits.tolist() == [3, 9, 10]
    assert weights.tolist() == [1, 2, 2]
    assert losses[0] > 2.5
    assert losses[1] < 0.7 * losses[0]


def test_log_keeps_means_of_windows() -> None:
    log = StepLog("test", every=2)
    for step, value in enumerate((1.0, 3.0, 10.0)):
        log.add(step, loss=value)
    assert len(log.records) == 1
    assert (log.records[0]["step"], log.records[0]["loss"]) == (2, 2.0)


@pytest.mark.slow
def test_saved_teacher_is_a_stock_pipeline(trained, tmp_path: Path) -> None:
    pipeline, log = trained
    save_teacher(pipeline, tmp_path, recipe=RECIPE, log=log)
    stock = DiffusionPipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert type(stock) is StableDiffusion3Pipeline
    stock.set_progress_bar_config(disable=True)
    prompts = ["the digit one", "a bold two"]
    output: Any = stock(prompts, num_inference_steps=1, guidance_scale=1.5, output_type="pt")
    pixels = output.images
    assert pixels.shape == (2, 3, 32, 32)
    assert 0.0 <= float(pixels.min()) < float(pixels.max()) <= 1.0

    assert read_prompts(tmp_path / "prompts.txt") == tuple(all_captions())
    latents = LatentDataset.load(tmp_path / "train_latents")
    assert latents.latents.shape == (1297, 4, 8, 8)
    assert float(latents.latents.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(latents.latents.std()) == pytest.approx(1.0, abs=1e-3)
    assert [label_of_prompt(text) for text in latents.prompts] == load_digits_split("train").labels.tolist()
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert record["recipe"]["transformer_steps"] == 2
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.slow
def test_same_seed_gives_the_same_weights(trained) -> None:
    pipeline, again = trained[0], train_teacher(RECIPE)[0]
    count = 0
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        weights = getattr(again, name).state_dict()
        for key, weight in getattr(pipeline, name).state_dict().items():
            assert torch.equal(weight, weights[key]), (name, key)
            count += weight.numel()
    assert count > 1_900_000
    assert again.vae.config["scaling_factor"] == pipeline.vae.config["scaling_factor"]
