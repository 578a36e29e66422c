"""CLIP tokenizers and text encoders of the embedded teacher, made without a download.

Every caption word is one token; any other text falls back to bytes, so no input raises.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.embedded.digits.images import all_captions, label_of_prompt, weight_of_prompt

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 8
HIDDEN = 32


def build_tokenizer(*, pad_token: str = END) -> CLIPTokenizer:
    """A byte-level BPE tokenizer whose merges build each caption word from left to right."""
    words = sorted({word for text in all_captions() for word in text.split()})
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [f"{character}</w>" for character in alphabet]
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        merged = symbols[0]
        for symbol in symbols[1:]:
            merge = (merged, symbol)
            merged += symbol
            if merge not in merges:
                merges.append(merge)
                tokens.append(merged)
    vocab = {token: index for index, token in enumerate([*tokens, BEGIN, END])}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # pyright: ignore[reportArgumentType]
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder of width 32 with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )
    return CLIPTextModelWithProjection(config)


def caption_targets(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Class targets of captions: digit (10 means the empty caption) and stroke weight (2 means not said)."""
    digits = [label_of_prompt(text) if text else 10 for text in captions]
    weights = [weight_of_prompt(text) for text in captions]
    return torch.tensor(digits), torch.tensor([2 if weight is None else weight for weight in weights])


def train_text_encoder(encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, *, steps: int) -> float:
    """Teach an encoder to tell captions apart: its pooled embedding predicts digit and stroke weight linearly.

    Returns the final cross-entropy. The encoder is changed in place and left frozen in eval mode.
    """
    captions = [*all_captions(), ""]
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    digits, weights = caption_targets(captions)
    head = nn.Linear(HIDDEN, 11 + 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    encoder.train()
    loss = torch.zeros(())
    for _ in range(steps):
        pooled = encoder(tokens).text_embeds
        digit_logits, weight_logits = head(pooled).split((11, 3), dim=1)
        # The norm is tied to its size at width 32 so that embeddings stay O(1) inputs of the transformer.
        size = (pooled.pow(2).mean() - 1.0).pow(2)
        loss = F.cross_entropy(digit_logits, digits) + F.cross_entropy(weight_logits, weights) + 0.1 * size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.requires_grad_(False).eval()
    return loss.item()
