"""Stable Diffusion 3 and 3.5: MMDiT transformers that speak rectified flow already (arXiv:2403.03206).

Legend: B batch, N text tokens, D width of a token, M image tokens.
"""

# diffusers says FloatTensor where it takes any tensor.
# pyright: reportArgumentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor
from torch.nn import functional
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from fewstep.core.condition import Condition
from fewstep.core.families.family import Configs, Family, network_dtype, no_stand_ins, pixel_size, require_pictures
from fewstep.core.families.parts.flow import require_fixed_grid
from fewstep.core.families.parts.latents import require_scaling

# Length of the T5 part in the stock pipeline; without T5 it appends as many zero tokens.
T5_TOKENS = 256
T5_COMPONENTS = ("text_encoder_3", "tokenizer_3")


@dataclass(frozen=True)
class Sd3Family(Family):
    """SD3 in canonical coordinates: the network's output is the velocity, its time is `time_scale` t.

    Without T5 the stock pipeline appends 256 zero tokens to the text. They are identical and stay so in every block, so
    conditions hold one of them with a count of 256 (see `KeyBiasJointAttention`).

    Attributes:
        time_scale: the network's time at t = 1, the scheduler's `num_train_timesteps`.
    """

    time_scale: float
    name: ClassVar[str] = "sd3"
    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
    )

    @staticmethod
    def from_pipeline(pipeline: StableDiffusion3Pipeline) -> Sd3Family:
        """The family of a pipeline. Raises ValueError when its scheduler is no FlowMatchEulerDiscreteScheduler."""
        return Sd3Family(time_scale=_require_flow_scheduler(pipeline).config["num_train_timesteps"])

    def prepare_network(self, network: SD3Transformer2DModel) -> None:
        """Give every block the attention that knows token counts; without counts it is the stock attention.

        One that knows them already, with tangents for instance, stays.
        """
        if not all(isinstance(found, KeyBiasJointAttention) for found in network.attn_processors.values()):
            network.set_attn_processor(KeyBiasJointAttention())

    def velocity(self, network: SD3Transformer2DModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The transformer's output at time `time_scale` t. Raises ValueError when the condition has no pooled text."""
        if condition.pooled is None:
            raise ValueError("SD3 needs pooled text embeddings, and the condition has none: encode with the SD3 family")
        dtype = network_dtype(network)
        counts = condition.token_counts
        output = network(
            hidden_states=x_t.to(dtype),
            # Twice as many times as samples go to a network of two times.
            timestep=t.expand(max(t.numel(), len(x_t))) * self.time_scale,
            encoder_hidden_states=condition.text.to(dtype),
            pooled_projections=condition.pooled.to(dtype),
            joint_attention_kwargs=None if counts is None else {"key_bias": counts.to(x_t).log()},
            return_dict=False,
        )[0]
        return output.to(x_t.dtype)

    def feature_map(self, output: Any, latents: tuple[int, ...]) -> Tensor:
        """Image tokens [B, M, D] of a block, which returns (text, image), as [B, D, M]."""
        return output[1].transpose(1, 2)

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: StableDiffusion3Pipeline,
        prompts: list[str],
        *,
        height: int | None = None,
        width: int | None = None,
    ) -> Condition:
        """Tokens [B, N, D] and pooled text; SD3 is not told the size. Without T5 one counted zero token ends them."""
        has_t5 = pipeline.text_encoder_3 is not None
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,  # pyright: ignore[reportArgumentType]
            prompt_3=None,  # pyright: ignore[reportArgumentType]
            do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS if has_t5 else 1,
        )
        assert tokens is not None
        # A T5 of zero weights stands for none, because stock loading insists on the component (see `zero_t5`).
        if has_t5 and tokens[:, -T5_TOKENS:].any():
            return Condition(tokens, pooled)
        if has_t5:
            tokens = tokens[:, : tokens.shape[1] - T5_TOKENS + 1]
        counts = torch.ones(tokens.shape[1], device=tokens.device)
        counts[-1] = T5_TOKENS
        return Condition(tokens, pooled, token_counts=counts)

    def latent_shape(
        self, pipeline: StableDiffusion3Pipeline, height: int | None, width: int | None, frames: int | None = None
    ) -> tuple[int, int, int]:
        """(C, h, w). Raises ValueError when a side is no multiple of the pixels that a patch covers."""
        require_pictures(self.name, frames)
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        side = config.sample_size * factor
        height, width = pixel_size((side, side), height, width, multiple=factor * config.patch_size)
        return config.in_channels, height // factor, width // factor

    def prompt_arguments(
        self, pipeline: StableDiffusion3Pipeline, condition: Condition, null: Condition | None
    ) -> dict[str, Any] | None:
        """Tokens and pooled text; the network is to be prepared (`prepare_network`) for counted tokens."""
        found: dict[str, Any] = {"prompt_embeds": condition.tokens, "pooled_prompt_embeds": condition.pooled}
        # The text of a real T5 has no repeated tokens to count.
        if condition.token_counts is not None:
            found["joint_attention_kwargs"] = {"key_bias": condition.token_counts.log()}
        if null is not None:
            found |= {"negative_prompt_embeds": null.tokens, "negative_pooled_prompt_embeds": null.pooled}
        return found

    def stand_ins(self, pipeline: StableDiffusion3Pipeline, absent: tuple[str, ...]) -> dict[str, Any]:
        """A T5 of zero weights for none.

        SD3 without T5 uses zeros in the place of the T5 tokens. It is saved as such, but diffusers 0.42 only loads it
        again if the caller passes `text_encoder_3=None, tokenizer_3=None`; a T5 of zero weights gives the same zeros.
        """
        if set(absent) != set(T5_COMPONENTS):
            return no_stand_ins(pipeline, absent)
        return dict(zip(T5_COMPONENTS, zero_t5(pipeline.transformer.config.joint_attention_dim), strict=True))


def require_sd3(configs: Configs) -> None:
    """Raises ValueError for an SD3 with another scheduler than rectified flow's, or another input than text."""
    transformer, scheduler = configs["transformer"], configs["scheduler"]
    if scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(_wrong_scheduler(str(scheduler.get("_class_name"))))
    require_fixed_grid(scheduler)
    takes, gives = transformer.get("in_channels", 16), transformer.get("out_channels", 16)
    if takes != gives:
        raise ValueError(
            f"the transformer takes {takes} channels and gives {gives}: it is told a picture beside the text; use a "
            "text-to-image model"
        )
    require_scaling(configs["vae"])


def _wrong_scheduler(name: str) -> str:
    return (
        f"SD3 needs a FlowMatchEulerDiscreteScheduler, this pipeline has {name}: replace "
        "scheduler/scheduler_config.json by the original model's"
    )


def _require_flow_scheduler(pipeline: StableDiffusion3Pipeline) -> FlowMatchEulerDiscreteScheduler:
    if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(_wrong_scheduler(type(pipeline.scheduler).__name__))
    return pipeline.scheduler


class KeyBiasJointAttention(JointAttnProcessor2_0):
    """The stock processor plus `key_bias` [N], a number added to the attention logits of each text key.

    n identical keys with identical values weigh as much in a softmax as one of them whose logit is raised by log n.
    Text tokens of SD3 have no position, so identical ones stay identical through all blocks and the shortened sequence
    gives the same picture, not an approximation. Without a bias, and in the image-only attention of SD3.5, the stock
    code runs.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Image tokens [B, M, D] and text tokens [B, N, D] after one joint attention."""
        if key_bias is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        query, key, value = joint_projections(attn, hidden_states, encoder_hidden_states)
        # The image keys come first and stand for one token each.
        bias = functional.pad(key_bias, (hidden_states.shape[1], 0)).to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.view(1, 1, 1, -1))
        mixed = mixed.transpose(1, 2).flatten(2).to(query.dtype)
        image, text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        # to_out is a linear layer and a dropout; the last block has no use for text, hence no projection of it.
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def joint_projections(attn: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, of image then text tokens: [B, heads, M + N, width of a head] each."""
    layers = (
        (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
        (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
        (attn.to_v, None, attn.add_v_proj, None),
    )
    query, key, value = (
        torch.cat([split_heads(attn, image, to, norm), split_heads(attn, text, add, added_norm)], dim=2)
        for to, norm, add, added_norm in layers
    )
    return query, key, value


def split_heads(attn: Any, tokens: Tensor, projection: torch.nn.Module, norm: torch.nn.Module | None) -> Tensor:
    """One projection of tokens [B, N, D] as [B, heads, N, width of a head]."""
    projected = projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return projected if norm is None else norm(projected)


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
