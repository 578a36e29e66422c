"""The embedded SANA teacher: a tiny, complete SanaPipeline that draws handwritten digits on command.

It has both stabilisers of SANA-Sprint (arXiv:2503.09641) from its first step on, since it is ours to train: the network
sees t and not 1000 t (`timestep_scale` 0.001, which the stock pipeline knows), and queries and keys are normalised.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.embedded.digits import all_captions, load_digits_split
from fewstep.core.embedded.progress import StepLog
from fewstep.core.embedded.sana_parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    build_autoencoder,
    build_text_encoder,
    build_tokenizer,
    raw_latents,
    train_autoencoder,
)
from fewstep.core.embedded.teacher import TeacherRecipe, train_transformer, training_captions
from fewstep.core.families.table import build_family

HEADS, HEAD_WIDTH = 4, 32


@dataclass(frozen=True)
class SanaRecipe:
    """Training lengths and the seed; the defaults make the shipped teacher."""

    seed: int = 0
    autoencoder_steps: int = 1500
    transformer_steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    condition_dropout: float = 0.1


def build_transformer() -> SanaTransformer2DModel:
    """An untrained SANA transformer: 4 blocks of width 128 on 16 image tokens, about 1.7 M parameters."""
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        num_layers=4,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=4,
        patch_size=1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,
    )


def build_pipeline(vae: AutoencoderDC, *, seed: int) -> SanaPipeline:
    """The pipeline around an autoencoder, with a text encoder of random weights and an untrained transformer."""
    tokenizer = build_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(tokenizer, seed=seed),
        vae=vae,
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),  # pyright: ignore[reportArgumentType]
    )


def train_sana(recipe: SanaRecipe) -> tuple[SanaPipeline, dict[str, list[dict[str, float]]]]:
    """Build and train the whole pipeline on the training digits; returns it with its training log."""
    torch.manual_seed(recipe.seed)
    images = load_digits_split("train")
    logs = {name: StepLog(name, every=every) for name, every in (("autoencoder", 100), ("transformer", 200))}
    vae = build_autoencoder()
    train_autoencoder(vae, images.pixels, steps=recipe.autoencoder_steps, seed=recipe.seed, log=logs["autoencoder"])
    pipeline = build_pipeline(vae, seed=recipe.seed)
    family = build_family(pipeline)
    captions = family.encode_prompts(pipeline, all_captions())
    conditions = Condition.cat([captions, family.encode_null(pipeline)])
    latents = raw_latents(vae, images.pixels) * vae.config["scaling_factor"]
    shared = {name: value for name, value in asdict(recipe).items() if name in TeacherRecipe.__dataclass_fields__}
    train_transformer(
        Denoiser(pipeline.transformer, family),
        latents,
        images,
        conditions=conditions,
        recipe=TeacherRecipe(**shared),
        log=logs["transformer"],
    )
    return pipeline, {name: log.records for name, log in logs.items()}


def save_sana(
    pipeline: SanaPipeline, output: str | Path, *, recipe: SanaRecipe, log: dict[str, list[dict[str, float]]]
) -> None:
    """Write the pipeline, the prompt file, the training latents with captions, and `training.json` (recipe and log)."""
    output = Path(output)
    pipeline.save_pretrained(output, safe_serialization=True)
    captions = all_captions()
    (output / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    images = load_digits_split("train")
    rows = training_captions(images, torch.arange(len(images)), torch.Generator().manual_seed(recipe.seed))
    with torch.no_grad():
        latents = build_family(pipeline).encode_pixels(pipeline, images.pixels)
    LatentDataset(latents, tuple(captions[row] for row in rows)).save(output / "train_latents")
    record = {"recipe": asdict(recipe), "torch": torch.__version__, "threads": torch.get_num_threads(), "log": log}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
