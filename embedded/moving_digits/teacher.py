"""The embedded video teacher: a tiny, complete WanPipeline that moves handwritten digits on command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch.nn import functional

from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.core.families.wan import STOCK_TEXT_TOKENS
from fewstep.core.grids import shift_time
from fewstep.core.paths import add_noise
from fewstep.core.training.ema import Ema
from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.moving_digits.autoencoder import (
    LATENT_CHANNELS,
    AutoencoderStage,
    build_video_autoencoder,
    scaled_video_latents,
    standardise_latents,
    train_video_autoencoder,
)
from fewstep.embedded.moving_digits.clips import CLIP_FRAMES, all_clip_captions, moving_digits
from fewstep.embedded.moving_digits.text import (
    TEXT_TOKENS,
    TEXT_WIDTH,
    build_video_text_encoder,
    build_video_tokenizer,
    train_video_text_encoder,
)

# Of the scheduler and, as for Wan at 480p, towards noise: there it is decided which digit moves where.
SHIFT = 3.0
TRAINING_SHIFT = 2.0
WARM_UP = 200
# Clips drawn for the autoencoder have numbers from 0 on; those of the transformer start here.
FIRST_CLIP = 1_000_000
AUTOENCODER_FILE = "autoencoder.json"
Log = list[dict[str, float]]


@dataclass(frozen=True)
class VideoTeacherRecipe:
    """Training lengths and the seed of the embedded video teacher; the defaults make the shipped one.

    Attributes:
        autoencoder_steps: steps on clips of 9 frames, which are the first latent and two more.
        long_autoencoder_steps: steps after that on clips of 25 frames, for what the decoder remembers of earlier
            latents is not the same later on.
        statistics_clips: clips whose latents are standardised to mean 0 and standard deviation 1.
        short_steps: steps on the first `short_frames` latent frames of each clip, which cost less than half; the other
            steps see whole clips.
        long_text_every: each so many steps the text is padded to the 512 tokens of a stock call that is not told
            better, so that such a call works too.
        saved_clips: clips of the training set that are written beside the pipeline.
    """

    seed: int = 0
    text_steps: int = 300
    autoencoder_steps: int = 700
    long_autoencoder_steps: int = 300
    statistics_clips: int = 512
    clips: int = 6000
    short_steps: int = 3500
    short_frames: int = 3
    transformer_steps: int = 7500
    batch_size: int = 16
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    condition_dropout: float = 0.1
    long_text_every: int = 16
    saved_clips: int = 1200


def build_video_transformer() -> WanTransformer3DModel:
    """An untrained Wan transformer: 6 blocks of width 128 on 16 tokens per latent frame, about 1.6 M parameters."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=384,
        num_layers=6,
        cross_attn_norm=True,
        rope_max_seq_len=1024,
    )


def build_video_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    """The pipeline around an autoencoder, with untrained text encoder and transformer."""
    tokenizer = build_video_tokenizer()
    return WanPipeline(
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        text_encoder=build_video_text_encoder(tokenizer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        transformer=build_video_transformer(),
    )


def train_video_transformer(
    denoiser: Denoiser, dataset: LatentDataset, *, conditions: Condition, recipe: VideoTeacherRecipe, log: StepLog
) -> None:
    """Flow matching (arXiv:2210.02747) with condition dropout; leaves the EMA weights in place.

    `conditions` holds the embeddings of `all_clip_captions()` and, as its last row, of the empty caption. Times are
    logit-normal(0, 1), shifted by 2 (arXiv:2403.03206, Sec. 3.1 and Eq. 23); the loss is `|velocity - (eps - x0)|^2`.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    ema = Ema(denoiser, recipe.ema_decay)
    table = {text: row for row, text in enumerate(all_clip_captions())}
    captions = torch.tensor([table[text] for text in dataset.prompts])
    longer = Condition(functional.pad(conditions.text, (0, 0, 0, STOCK_TEXT_TOKENS - TEXT_TOKENS)))
    denoiser.train()
    for step in range(recipe.transformer_steps):
        rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / recipe.transformer_steps))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
        rows = torch.randint(len(captions), (recipe.batch_size,), generator=generator)
        drop = torch.rand(len(rows), generator=generator) < recipe.condition_dropout
        texts = longer if (step + 1) % recipe.long_text_every == 0 else conditions
        condition = texts.index(captions[rows].masked_fill(drop, len(table)))
        x0 = dataset.latents[rows, :, : recipe.short_frames if step < recipe.short_steps else None]
        eps = torch.randn(x0.shape, generator=generator)
        t = shift_time(torch.sigmoid(torch.randn(len(rows), generator=generator)), TRAINING_SHIFT)
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


def trained_autoencoder(recipe: VideoTeacherRecipe, folder: Path) -> tuple[AutoencoderKLWan, Log]:
    """The autoencoder and its log; one that an interrupted run of the same recipe left in `folder` is taken over."""
    stages = (
        AutoencoderStage(recipe.autoencoder_steps, frames=9, batch_size=8, learning_rate=2e-3),
        AutoencoderStage(recipe.long_autoencoder_steps, frames=CLIP_FRAMES, batch_size=4, learning_rate=1e-3),
    )
    key = {"seed": recipe.seed, "stages": [asdict(stage) for stage in stages], "torch": torch.__version__}
    file = folder / AUTOENCODER_FILE
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        # JSON has no tuples.
        if record["key"] == json.loads(json.dumps(key)):
            vae = AutoencoderKLWan.from_pretrained(folder / "vae", use_safetensors=True)
            return vae.requires_grad_(False).eval(), record["log"]
    torch.manual_seed(recipe.seed)
    vae, log = build_video_autoencoder(), StepLog("autoencoder", every=50)
    for number, stage in enumerate(stages):
        train_video_autoencoder(vae, stage, seed=recipe.seed + number, log=log)
    standardise_latents(vae, clips=recipe.statistics_clips, seed=recipe.seed + 1)
    vae.save_pretrained(folder / "vae", safe_serialization=True)
    file.write_text(json.dumps({"key": key, "log": log.records}) + "\n", encoding="utf-8")
    return vae, log.records


def training_latents(vae: AutoencoderKLWan, *, clips: int, seed: int) -> LatentDataset:
    """Standardised latents [clips, 8, 7, 8, 8] of moving training digits, and their captions."""
    parts, captions = [], []
    for start in range(0, clips, 64):
        rows = range(FIRST_CLIP + start, FIRST_CLIP + min(start + 64, clips))
        batch = moving_digits("train", seed=seed, indices=rows)
        parts.append(scaled_video_latents(vae, batch.pixels))
        captions += batch.captions
    return LatentDataset(torch.cat(parts), tuple(captions))


def train_video_teacher(
    recipe: VideoTeacherRecipe, output: str | Path
) -> tuple[WanPipeline, LatentDataset, dict[str, Log]]:
    """Build and train the whole pipeline on moving training digits; returns it with its data and training log."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    vae, autoencoder_log = trained_autoencoder(recipe, output)
    # Seeded again, so that a run that takes over an autoencoder equals one that trains it.
    torch.manual_seed(recipe.seed + 1)
    pipeline = build_video_pipeline(vae)
    train_video_text_encoder(pipeline.text_encoder, pipeline.tokenizer, steps=recipe.text_steps)  # pyright: ignore
    dataset = training_latents(vae, clips=recipe.clips, seed=recipe.seed)
    family = build_family(pipeline)
    conditions = family.encode_prompts(pipeline, [*all_clip_captions(), ""])
    log = StepLog("transformer", every=100)
    denoiser = Denoiser(family.network(pipeline), family)
    train_video_transformer(denoiser, dataset, conditions=conditions, recipe=recipe, log=log)
    return pipeline, dataset, {"autoencoder": autoencoder_log, "transformer": log.records}


def save_video_teacher(
    pipeline: WanPipeline,
    dataset: LatentDataset,
    output: str | Path,
    *,
    recipe: VideoTeacherRecipe,
    log: dict[str, Log],
) -> None:
    """Write the pipeline, the prompt file, training latents (fp16) with captions, and `training.json`."""
    output = Path(output)
    pipeline.save_pretrained(output, safe_serialization=True)
    (output / "prompts.txt").write_text("\n".join(all_clip_captions()) + "\n", encoding="utf-8")
    saved = slice(0, recipe.saved_clips)
    LatentDataset(dataset.latents[saved].half(), dataset.prompts[saved]).save(output / "train_latents")
    record = {"recipe": asdict(recipe), "torch": torch.__version__, "threads": torch.get_num_threads(), "log": log}
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / AUTOENCODER_FILE).unlink(missing_ok=True)
