"""The embedded SANA teacher: its tokenizer and its training code for a few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SanaPipeline

from fewstep.core.data import LatentDataset, read_prompts
from fewstep.embedded.digits.images import all_captions, load_digits_split
from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.digits.sana_teacher import (
    SanaRecipe,
    build_gemma,
    build_gemma_tokenizer,
    build_sana_autoencoder,
    instruction_text,
    raw_sana_latents,
    save_sana,
    train_sana,
    train_sana_autoencoder,
)


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = build_gemma_tokenizer()
    for caption in all_captions():
        assert len(tokenizer(caption).input_ids) == 1 + len(caption.split())
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert tokenizer.decode(tokenizer("the bold digit seven").input_ids, skip_special_tokens=True) == (
        "the bold digit seven"
    )
    odd = tokenizer("a Zebra \u20ac").input_ids
    assert tokenizer.unk_token_id not in odd
    assert len(odd) > 4
    assert 200 < len(tokenizer(instruction_text()).input_ids) < 600


def test_text_encoder_tells_digits_apart_and_is_its_seed() -> None:
    tokenizer = build_gemma_tokenizer()
    state = torch.random.get_rng_state()
    encoder, again = (build_gemma(tokenizer, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = tokenizer(["the digit one", "the digit two", "a one"], padding=True, return_tensors="pt")
    found = encoder(**ids)[0]
    assert torch.equal(found, again(**ids)[0])
    assert found.shape == (3, 4, 32)
    # The last token is the digit (padding is on the left): far apart for two digits, close for one in two phrases.
    one, two, other_one = found[:, -1]
    assert (one - other_one).norm() < 0.5 * (one - two).norm()


def test_autoencoder_learns_and_scales() -> None:
    pixels = load_digits_split("train").pixels[:64]
    torch.manual_seed(0)
    vae, log = build_sana_autoencoder(), StepLog("autoencoder", every=5)
    train_sana_autoencoder(vae, pixels, steps=15, seed=0, log=log)
    assert log.records[-1]["loss"] < 0.7 * log.records[0]["loss"]
    latents = raw_sana_latents(vae, pixels) * vae.config["scaling_factor"]
    assert latents.shape == (64, 16, 4, 4)
    assert latents.std().item() == pytest.approx(1.0, abs=1e-4)
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.slow
def test_training_writes_a_complete_pipeline(tmp_path: Path) -> None:
    recipe = SanaRecipe(autoencoder_steps=2, transformer_steps=2, batch_size=4)
    pipeline, log = train_sana(recipe)
    save_sana(pipeline, tmp_path / "made", recipe=recipe, log=log)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "made")
    assert isinstance(loaded, SanaPipeline)
    data = LatentDataset.load(tmp_path / "made" / "train_latents")
    assert data.latents.shape == (1297, 16, 4, 4)
    assert read_prompts(tmp_path / "made" / "prompts.txt") == tuple(all_captions())
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["recipe"]["transformer_steps"] == 2
