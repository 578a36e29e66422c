"""Tokenizer, text encoder and autoencoder of the embedded SANA teacher, made without a download.

Shapes: pixels [N, 3, 32, 32] in [0, 1], latents [N, 16, 4, 4].
"""

# diffusers annotates constructors with the types of their defaults, which are narrower than what they take.
# pyright: reportArgumentType=false

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaPipeline
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from fewstep.core.embedded.digits import all_captions
from fewstep.core.embedded.progress import StepLog

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


def build_tokenizer() -> GemmaTokenizer:
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


def build_text_encoder(tokenizer: GemmaTokenizer, *, seed: int) -> Gemma2Model:
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


def build_autoencoder() -> AutoencoderDC:
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


def train_autoencoder(vae: AutoencoderDC, pixels: Tensor, *, steps: int, seed: int, log: StepLog) -> None:
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
    vae.register_to_config(scaling_factor=1.0 / raw_latents(vae, pixels).std().item())


@torch.no_grad()
def raw_latents(vae: AutoencoderDC, pixels: Tensor, batch_size: int = 256) -> Tensor:
    """Latents [N, 16, 4, 4] of pixels in [0, 1], before scaling."""
    parts = [vae.encode(part * 2.0 - 1.0, return_dict=False)[0] for part in pixels.split(batch_size)]
    return torch.cat(parts)
