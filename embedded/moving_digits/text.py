"""The T5 tokenizer and UMT5 text encoder of the embedded video teacher, made without a download.

Every caption word is one token. Other words are spelled in letters, and what is no letter or digit is unknown; no input
raises.
"""

from __future__ import annotations

import string

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from fewstep.embedded.digits.images import label_of_prompt
from fewstep.embedded.moving_digits.clips import all_clip_captions, direction_of_prompt, speed_of_prompt

# Captions have at most 6 words. The stock pipeline pads to 512 unless it is told this number.
TEXT_TOKENS = 16
TEXT_WIDTH = 64
SPACE = "\u2581"
HEAD_SIZES = (11, 5, 3)


def build_video_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer with the words of the captions, letters and digits."""
    words = sorted({word for text in all_clip_captions() for word in text.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0)]
    # A letter costs more than any word, so that a known word is never spelled.
    vocabulary += [(SPACE + word, -1.0) for word in words]
    vocabulary += [(letter, -10.0) for letter in string.ascii_letters + string.digits]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_video_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder of width 64 with random weights."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def clip_caption_targets(captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Class targets of captions: digit, direction and speed; the empty caption is a class of its own in each."""
    readers = ((label_of_prompt, 10), (direction_of_prompt, 4), (speed_of_prompt, 2))
    digits, directions, speeds = (
        torch.tensor([read(text) if text else empty for text in captions]) for read, empty in readers
    )
    return digits, directions, speeds


def train_video_text_encoder(encoder: UMT5EncoderModel, tokenizer: T5Tokenizer, *, steps: int) -> float:
    """Teach an encoder to tell captions apart: the mean of its tokens predicts digit, direction and speed linearly.

    Returns the final cross-entropy. The encoder is changed in place and left frozen in eval mode.
    """
    captions = [*all_clip_captions(), ""]
    inputs = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
    mask = inputs.attention_mask[..., None].float()
    targets = clip_caption_targets(captions)
    head = nn.Linear(TEXT_WIDTH, sum(HEAD_SIZES))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    encoder.train()
    loss = torch.zeros(())
    for _ in range(steps):
        tokens = encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
        pooled = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
        parts = head(pooled).split(HEAD_SIZES, dim=1)
        # The norm is tied to its size at width 64 so that tokens stay O(1) inputs of the transformer.
        size = ((tokens.pow(2) * mask).sum() / (mask.sum() * TEXT_WIDTH) - 1.0).pow(2)
        loss = sum((F.cross_entropy(p, target) for p, target in zip(parts, targets, strict=True)), 0.1 * size)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.requires_grad_(False).eval()
    return loss.item()
