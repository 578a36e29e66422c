"""Tiny networks without their pipelines: SANA and Wan transformers, and every network with an input for it.

The real classes with random weights, in sizes that a CPU runs in milliseconds. Linear layers of SANA and Wan are wider
than diffusers initialises them, so that attention is far from uniform. The same seed gives the same weights.
"""

# diffusers annotates narrower types than it takes.
# pyright: reportArgumentType=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SanaTransformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from fewstep.core.families.sd3 import KeyBiasJointAttention
from tests.tiny_pipelines import CLIP_WIDTH, LATENT_SHAPE, T5_WIDTH, build_sd3, build_sd15, build_sdxl

TEXT_WIDTH = 16
IMAGE_WIDTH = 12
# Wan's image-to-video networks know their text by this length alone.
WAN_TEXT_TOKENS = 512
SANA_LATENT_SHAPE = (4, 4, 4)
WAN_LATENT_SHAPE = (4, 3, 4, 4)
WAN_FRAME_TOKENS = 4
# Small and exact in fp32, so that what diffusers makes of them in fp32 is accurate.
TIMESTEPS = (0.75, 1.25)
CASES = ("sd3", "sd3-counts", "sd3.5", "sana", "sana-norm", "wan", "wan-image", "sd15", "sd15-mask", "sdxl")


@dataclass(frozen=True)
class NetworkCase:
    """A network and a point to call it at.

    Attributes:
        network: a diffusers model.
        call: (network, x, timestep [2], text tokens) to the output.
        point: x, timestep and text tokens of batch 2.
    """

    network: Any
    call: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    point: tuple[Tensor, Tensor, Tensor]


def widen_weights(network: nn.Module, std: float = 0.15) -> None:
    """Normal linear weights and modulation tables of that standard deviation."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 or "scale_shift_table" in name:
            nn.init.normal_(parameter, std=std)


def build_sana(*, qk_norm: str | None = None, seed: int = 0) -> SanaTransformer2DModel:
    """SANA with two blocks: linear self-attention, softmax attention to text."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SanaTransformer2DModel(
            in_channels=SANA_LATENT_SHAPE[0],
            out_channels=SANA_LATENT_SHAPE[0],
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            sample_size=SANA_LATENT_SHAPE[1],
            qk_norm=qk_norm,
        )
        widen_weights(network)
    return network.eval()


def build_wan(*, image_to_video: bool = False, seed: int = 0) -> WanTransformer3DModel:
    """Wan with two blocks, four tokens a frame; `image_to_video` adds keys of an image in cross-attention."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=WAN_LATENT_SHAPE[0],
            out_channels=WAN_LATENT_SHAPE[0],
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=64,
            cross_attn_norm=True,
            image_dim=IMAGE_WIDTH if image_to_video else None,
            added_kv_proj_dim=24 if image_to_video else None,
        )
        widen_weights(network)
    return network.eval()


def build_case(name: str, dtype: torch.dtype = torch.float64) -> NetworkCase:
    """The network and point of that name in `CASES`, in that dtype; points are the same in every dtype."""
    if name.startswith("sd3"):
        return sd3_case(name, dtype)
    if name.startswith("sana"):
        return sana_case(name, dtype)
    return wan_case(name, dtype) if name.startswith("wan") else unet_case(name, dtype)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers of that seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def point(latent: tuple[int, ...], text: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, *latent], timesteps and tokens [2, *text]."""
    timestep = torch.tensor(TIMESTEPS, dtype=torch.promote_types(dtype, torch.float32))
    return draw((2, *latent), 1, dtype), timestep, draw((2, *text), 2, dtype)


def sd3_case(name: str, dtype: torch.dtype) -> NetworkCase:
    """SD3, with one token that counts as many ("sd3-counts"), or SD3.5."""
    network = build_sd3(sd35=name == "sd3.5").transformer.to(dtype)
    pooled = draw((2, 2 * CLIP_WIDTH), 3, dtype)
    extra = None
    if name == "sd3-counts":
        network.set_attn_processor(KeyBiasJointAttention())
        extra = {"key_bias": torch.tensor([1.0, 1.0, 1.0, 1.0, 256.0], dtype=dtype).log()}

    def call(network: Any, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        return network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            joint_attention_kwargs=extra,
            return_dict=False,
        )[0]

    return NetworkCase(network, call, point(LATENT_SHAPE, (5, T5_WIDTH), dtype))


def sana_case(name: str, dtype: torch.dtype) -> NetworkCase:
    """SANA with a text mask that is no prefix; "sana-norm" has query and key norms."""
    network = build_sana(qk_norm="rms_norm_across_heads" if name == "sana-norm" else None).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], dtype=dtype)

    def call(network: Any, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        return network(x, tokens, timestep, encoder_attention_mask=mask, return_dict=False)[0]

    return NetworkCase(network, call, point(SANA_LATENT_SHAPE, (5, TEXT_WIDTH), dtype))


def wan_case(name: str, dtype: torch.dtype) -> NetworkCase:
    """Wan from text, or from text and three image tokens ("wan-image")."""
    with_image = name == "wan-image"
    network = build_wan(image_to_video=with_image).to(dtype)
    image = draw((2, 3, IMAGE_WIDTH), 4, dtype) if with_image else None

    def call(network: Any, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        return network(x, timestep, tokens, encoder_hidden_states_image=image, return_dict=False)[0]

    text = WAN_TEXT_TOKENS if with_image else 5
    return NetworkCase(network, call, point(WAN_LATENT_SHAPE, (text, TEXT_WIDTH), dtype))


def unet_case(name: str, dtype: torch.dtype) -> NetworkCase:
    """The U-Net of SD1.5, also with a text mask ("sd15-mask"), or of SDXL."""
    is_xl = name == "sdxl"
    network = (build_sdxl() if is_xl else build_sd15()).unet.to(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], dtype=dtype) if name == "sd15-mask" else None
    added = None
    if is_xl:
        size = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).expand(2, -1)
        added = {"text_embeds": draw((2, CLIP_WIDTH), 3, dtype), "time_ids": size}

    def call(network: Any, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        extra = {"encoder_attention_mask": mask, "added_cond_kwargs": added, "return_dict": False}
        return network(x, timestep, tokens, **extra)[0]

    return NetworkCase(network, call, point(LATENT_SHAPE, (5, 2 * CLIP_WIDTH if is_xl else CLIP_WIDTH), dtype))


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a - b).detach().double().norm() / b.detach().double().norm())


def jvp(function: Any, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Output and tangent."""
    output, tangent = torch.func.jvp(function, primals, tangents)[:2]
    return output, tangent
