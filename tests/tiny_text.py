"""Tiny language models of the text encoders of newer pipelines, and tokenizers for them, made in memory."""

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# How Qwen2.5-VL is told where a picture stands.
PICTURE_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MARK_IDS = ("image_token_id", "video_token_id")
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """The 256 printable stand-ins of a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(others))]


def build_qwen_tokenizer(extra: tuple[str, ...] = ()) -> Qwen2Tokenizer:
    """One token per byte, the marks of a chat, and `extra` ones."""
    marks = [*SPECIALS, *extra]
    vocab = {letter: number for number, letter in enumerate([*byte_letters(), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=marks[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3_config(tokenizer: Qwen2Tokenizer, *, width: int, layers: int) -> Qwen3Config:
    """Two heads."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
    )


def build_qwen3(tokenizer: Qwen2Tokenizer, *, width: int = 16, layers: int = 2) -> Qwen3Model:
    """A Qwen3 language model without its last layer."""
    return Qwen3Model(qwen3_config(tokenizer, width=width, layers=layers)).eval()


def build_qwen3_causal(tokenizer: Qwen2Tokenizer, *, width: int = 16, layers: int = 2) -> Qwen3ForCausalLM:
    """A whole Qwen3 language model."""
    return Qwen3ForCausalLM(qwen3_config(tokenizer, width=width, layers=layers)).eval()


def build_qwen_vl(tokenizer: Qwen2Tokenizer, *, width: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with two layers of text and one of pictures."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
    }
    places = dict(zip(("vision_start_token_id", "vision_end_token_id", *MARK_IDS), PICTURE_MARKS, strict=True))
    marks: dict[str, Any] = {key: tokenizer.convert_tokens_to_ids(mark) for key, mark in places.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build_qwen_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """What shows text and pictures to the encoder; a picture becomes few tokens, whatever its size."""
    pictures: dict[str, Any] = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 256,
        "max_pixels": 1024,
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pictures),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pictures),
        chat_template=CHAT,
    )
