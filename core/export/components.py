"""Components that a teacher does without and that plain `from_pretrained` insists on."""

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

T5_COMPONENTS = ("text_encoder_3", "tokenizer_3")


def absent_components(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Names of the components that are None and that the class of the pipeline does not call optional."""
    optional = set(pipeline._optional_components)
    return tuple(name for name, part in pipeline.components.items() if part is None and name not in optional)


def stand_ins(pipeline: DiffusionPipeline) -> dict[str, nn.Module | T5Tokenizer]:
    """A component for each absent one, with which the pipeline does exactly what it does without.

    SD3 without T5 uses zeros in the place of the T5 tokens. It is saved as such, but diffusers 0.42 only loads it again
    if the caller passes `text_encoder_3=None, tokenizer_3=None`; a T5 of zero weights gives the same zeros.

    Raises:
        ValueError: another component is absent.
    """
    absent = absent_components(pipeline)
    if not absent:
        return {}
    if not isinstance(pipeline, StableDiffusion3Pipeline) or set(absent) != set(T5_COMPONENTS):
        raise ValueError(
            f"the teacher ({type(pipeline).__name__}) has no {', '.join(absent)}, and its class cannot be loaded "
            "without. Give the teacher these components, or export with lora_only."
        )
    return dict(zip(T5_COMPONENTS, zero_t5(pipeline.transformer.config.joint_attention_dim), strict=True))


def zero_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 encoder of a few thousand zero weights whose output is zeros [B, N, width], and a tokenizer for it."""
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=1, d_ff=1, num_layers=1, num_heads=1)
    # Its random weights are thrown away: the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        encoder = T5EncoderModel(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    return encoder.eval(), tokenizer
