"""The embedded SANA teacher: a tiny, complete SanaPipeline that draws handwritten digits on command.

It has both stabilisers of SANA-Sprint (arXiv:2503.09641) from its first step on, since it is ours to train: the network
sees t and not 1000 t (`timestep_scale` 0.001, which the stock pipeline knows), and queries and keys are normalised.
Tokenizer, text encoder and autoencoder are made without a download.

Shapes: pixels [N, 3, 32, 32] in [0, 1], latents [N, 16, 4, 4].
"""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from fewstep.core.condition import Condition
from fewstep.core.data import LatentDataset
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.table import build_family
from fewstep.embedded.digits.images import all_captions, load_digits_split
from fewstep.embedded.digits.progress import StepLog
from fewstep.embedded.digits.teacher import TeacherRecipe, train_transformer, training_captions

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


def build_sana_transformer() -> SanaTransformer2DModel:
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


def build_sana_pipeline(vae: AutoencoderDC, *, seed: int) -> SanaPipeline:
    """The pipeline around an autoencoder, with a text encoder of random weights and an untrained transformer."""
    tokenizer = build_gemma_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=build_gemma(tokenizer, seed=seed),
        vae=vae,
        transformer=build_sana_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),  # pyright: ignore[reportArgumentType]
    )


def train_sana(recipe: SanaRecipe) -> tuple[SanaPipeline, dict[str, list[dict[str, float]]]]:
    """Build and train the whole pipeline on the training digits; returns it with its training log."""
    torch.manual_seed(recipe.seed)
    images = load_digits_split("train")
    logs = {name: StepLog(name, every=every) for name, every in (("autoencoder", 100), ("transformer", 200))}
    vae = build_sana_autoencoder()
    train_sana_autoencoder(
        vae, images.pixels, steps=recipe.autoencoder_steps, seed=recipe.seed, log=logs["autoencoder"]
    )
    pipeline = build_sana_pipeline(vae, seed=recipe.seed)
    family = build_family(pipeline)
    captions = family.encode_prompts(pipeline, all_captions())
    conditions = Condition.cat([captions, family.encode_null(pipeline)])
    latents = raw_sana_latents(vae, images.pixels) * vae.config["scaling_factor"]
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


SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")


# What a SentencePiece vocabulary writes for a space.
SPACE = "\u2581"


TEXT_WIDTH = 32


LATENT_CHANNELS = 16


# Standard deviation of the noise in which the decoder has to find a latent.
LATENT_NOISE = 0.1


def instruction_text() -> str:
    """What SanaPipeline puts before every prompt by default."""
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def build_gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer whose merges build every word of the captions and of SANA's instruction from left to right.

    Other text falls back to letters, and letters it does not know to bytes, so no input raises.
    """

    # Gemma's tokenizer cuts behind each space and keeps it with the word before.
    def words_of(texts: list[str]) -> list[str]:
        return sorted({word for text in texts for word in text.replace(" ", SPACE + " ").split(" ")})

    # Early merges win: a word of the captions is one token, one of the instruction may be cut.
    words = [*words_of(all_captions()), *words_of([instruction_text()])]
    alphabet = sorted({character for word in words for character in word})
    tokens = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    merges: list[tuple[str, str]] = []
    for word in words:
        merged = word[0] if word else ""
        for character in word[1:]:
            if merged + character not in tokens:
                merges.append((merged, character))
                tokens.append(merged + character)
            merged += character
    vocab = {token: index for index, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=1024, add_bos_token=True)


def build_gemma(tokenizer: GemmaTokenizer, *, seed: int) -> Gemma2Model:
    """A two-layer Gemma2 of width 32 with random weights, which stay: words differ in it, and that is enough."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        # Without it torch can take its fused attention, which is several times faster.
        attn_logit_softcapping=None,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Gemma2Model(config)
        # The blocks normalise what they add to length one, and much of it is the instruction's: words must outweigh it.
        torch.nn.init.normal_(encoder.embed_tokens.weight, std=0.5)
    return encoder.requires_grad_(False).eval()


def build_sana_autoencoder() -> AutoencoderDC:
    """An untrained deep-compression autoencoder (arXiv:2410.10733): eight times smaller sides, 16 channels."""
    widths = (16, 32, 64, 64)
    plain = ((),) * len(widths)
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=plain,
        decoder_qkv_multiscales=plain,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
    )


def train_sana_autoencoder(vae: AutoencoderDC, pixels: Tensor, *, steps: int, seed: int, log: StepLog) -> None:
    """Fit reconstruction (L1 + MSE) on pixels [N, 3, 32, 32]; sets the scaling factor and freezes.

    The decoder sees latents with a little noise, and their square is penalised as the KL term of a posterior of that
    fixed width would: without, errors of a generator would be new to it. After scaling, latents have standard deviation
    1 over the training data; SANA has no shift, so their mean stays.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    vae.train()
    for step in range(steps):
        rows = torch.randint(len(pixels), (32,), generator=generator)
        target = pixels[rows] * 2.0 - 1.0
        latent = vae.encode(target, return_dict=False)[0]
        noisy = latent + LATENT_NOISE * torch.randn(latent.shape, generator=generator)
        decoded = vae.decode(noisy, return_dict=False)[0]
        size = latent.square().mean()
        loss = F.l1_loss(decoded, target) + F.mse_loss(decoded, target) + 1e-3 * size
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log.add(step, loss=loss.item(), size=size.item())
    vae.requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=1.0 / raw_sana_latents(vae, pixels).std().item())


@torch.no_grad()
def raw_sana_latents(vae: AutoencoderDC, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Latents [N, 16, 4, 4] of pixels in [0, 1], before scaling."""
    parts = [vae.encode(part * 2.0 - 1.0, return_dict=False)[0] for part in pixels.split(batch_size)]
    return torch.cat(parts)
