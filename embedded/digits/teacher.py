"""The embedded teacher: a tiny, complete StableDiffusion3Pipeline that draws handwritten digits on command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.sd3 import zero_t5
from fewstep.core.families.table import build_family
from fewstep.core.paths import add_noise
from fewstep.core.training.ema import Ema
from fewstep.embedded.digits.autoencoder import build_autoencoder, scaled_latents, train_autoencoder
from fewstep.embedded.digits.images import DigitImages, all_captions, caption, load_digits_split
from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.digits.text import build_text_encoder, build_tokenizer, train_text_encoder

PHRASING_COUNT = 4
JOINT_WIDTH = 64


@dataclass(frozen=True)
class TeacherRecipe:
    """Training lengths and the seed of the embedded teacher; the defaults make the shipped one."""

    seed: int = 0
    text_steps: int = 300
    autoencoder_steps: int = 1200
    transformer_steps: int = 8000
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    condition_dropout: float = 0.1


def build_transformer() -> SD3Transformer2DModel:
    """An untrained SD3 transformer: 3 joint blocks of width 128 on 16 image tokens, about 1.7 M parameters."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def build_pipeline(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The pipeline around an autoencoder, with untrained text encoders and transformer.

    Its T5 has zero weights, which is the same as none, but lets plain `from_pretrained` load the folder.
    """
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer(pad_token="!")
    encoder_3, tokenizer_3 = zero_t5(JOINT_WIDTH)
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def training_captions(images: DigitImages, rows: Tensor, generator: torch.Generator) -> list[int]:
    """Row numbers in `all_captions()` for a batch: random phrasing, stroke weight said in half of the captions."""
    table = {text: index for index, text in enumerate(all_captions())}
    phrasings = torch.randint(PHRASING_COUNT, (len(rows),), generator=generator).tolist()
    said = (torch.rand(len(rows), generator=generator) < 0.5).tolist()
    texts = [
        caption(digit, weight=weight if say else None, phrasing=phrasing)
        for digit, weight, say, phrasing in zip(
            images.labels[rows].tolist(), images.weights[rows].tolist(), said, phrasings, strict=True
        )
    ]
    return [table[text] for text in texts]


def train_transformer(
    denoiser: Denoiser,
    latents: Tensor,
    images: DigitImages,
    *,
    conditions: Condition,
    recipe: TeacherRecipe,
    log: StepLog,
) -> None:
    """Flow matching (arXiv:2210.02747) on latents [N, 4, 8, 8] with condition dropout; leaves the EMA weights in place.

    `conditions` holds the embeddings of `all_captions()` and, as its last row, of the empty caption. Times are
    logit-normal(0, 1) as in SD3 (arXiv:2403.03206, section 3.1); the loss is `|velocity - (eps - x0)|^2`.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    ema = Ema(denoiser, recipe.ema_decay)
    empty = len(all_captions())
    denoiser.train()
    for step in range(recipe.transformer_steps):
        rate = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / recipe.transformer_steps))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
        rows = torch.randint(len(latents), (recipe.batch_size,), generator=generator)
        captions = torch.tensor(training_captions(images, rows, generator))
        drop = torch.rand(len(rows), generator=generator) < recipe.condition_dropout
        condition = conditions.index(captions.masked_fill(drop, empty))
        x0 = latents[rows]
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(rows), generator=generator))
        velocity = denoiser(add_noise(x0, eps, t), t, condition)
        loss = (velocity - (eps - x0)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        ema.update(step + 1)
        log.add(step, loss=loss.item())
    ema.copy_to(denoiser)
    denoiser.requires_grad_(False).eval()


def train_teacher(recipe: TeacherRecipe) -> tuple[StableDiffusion3Pipeline, dict[str, list[dict[str, float]]]]:
    """Build and train the whole pipeline on the training digits; returns it with its training log."""
    torch.manual_seed(recipe.seed)
    images = load_digits_split("train")
    logs = {name: StepLog(name, every=every) for name, every in (("autoencoder", 100), ("transformer", 200))}

    vae = build_autoencoder()
    train_autoencoder(vae, images.pixels, steps=recipe.autoencoder_steps, seed=recipe.seed, log=logs["autoencoder"])
    pipeline = build_pipeline(vae)
    train_text_encoder(pipeline.text_encoder, pipeline.tokenizer, steps=recipe.text_steps)
    train_text_encoder(pipeline.text_encoder_2, pipeline.tokenizer_2, steps=recipe.text_steps)

    family = build_family(pipeline)
    conditions = family.encode_prompts(pipeline, [*all_captions(), ""])
    denoiser = Denoiser(pipeline.transformer, family)
    latents = scaled_latents(vae, images.pixels)
    train_transformer(denoiser, latents, images, conditions=conditions, recipe=recipe, log=logs["transformer"])
    return pipeline, {name: log.records for name, log in logs.items()}


def save_teacher(
    pipeline: StableDiffusion3Pipeline,
    output: str | Path,
    *,
    recipe: TeacherRecipe,
    log: dict[str, list[dict[str, float]]],
) -> None:
    """Write the pipeline, the prompt file, the training latents with captions, and `training.json` (recipe and log)."""
    output = Path(output)
    pipeline.save_pretrained(output, safe_serialization=True)
    (output / "prompts.txt").write_text("\n".join(all_captions()) + "\n", encoding="utf-8")
    images = load_digits_split("train")
    captions = all_captions()
    rows = training_captions(images, torch.arange(len(images)), torch.Generator().manual_seed(recipe.seed))
    latents = scaled_latents(pipeline.vae, images.pixels)
    LatentDataset(latents, tuple(captions[row] for row in rows)).save(output / "train_latents")
    record = {"recipe": asdict(recipe), "torch": torch.__version__, "threads": torch.get_num_threads(), "log": log}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
