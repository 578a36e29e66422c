"""Forward-mode tangents through whole diffusers networks: the switch, and the check before a training run.

torch's fused attention has no forward mode, so neither have diffusers networks as they come. What else they are made of
has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.family import network_dtype
from fewstep.core.families.sd3 import KeyBiasJointAttention
from fewstep.core.tangents.fused import FUSED_TANGENT, with_fused_tangent
from fewstep.core.tangents.processors import (
    JvpJointAttention,
    JvpSanaAttention,
    JvpUnetAttention,
    JvpWanAttention,
)
from fewstep.kernels.check_jvp import JvpCheck, check_jvp

# Stock processors and what takes their place.
REPLACEMENTS: dict[type, Callable[[], Any]] = {
    JointAttnProcessor2_0: JvpJointAttention,
    KeyBiasJointAttention: JvpJointAttention,
    SanaAttnProcessor2_0: JvpSanaAttention,
    WanAttnProcessor: JvpWanAttention,
    AttnProcessor2_0: JvpUnetAttention,
}
FUSED_CALLS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
# These have forward mode: the first is linear attention in plain torch.
KEPT = (SanaLinearAttnProcessor2_0, JvpJointAttention, JvpSanaAttention, JvpWanAttention, JvpUnetAttention)


def use_jvp_attention(network: nn.Module) -> None:
    """Replace the attention processors of a diffusers network so that `torch.func.jvp` goes through it, in place.

    Output, weights and their names stay; a second call changes nothing. SD3, SANA, Wan and U-Nets have processors of
    their own here; those of other networks run as they are, with this package's attention in the place of torch's fused
    one (`with_fused_tangent`). The self-attention of SANA is linear and has forward mode as it is. Call this after a
    `Denoiser` was made of the network, which sets processors too.

    Args:
        network: a diffusers model, not wrapped.

    Raises:
        ValueError: the network has no attention, or one of its processors computes in a way that is not known.
    """
    modules = {name: module for name, module in network.named_modules() if callable(getattr(module, "processor", None))}
    if not modules:
        raise ValueError(
            f"{type(network).__name__} has no attention that diffusers calls by a processor: give the network without "
            "a wrapper (for DDP, its module), or take the tangent by finite differences"
        )
    # All are known before the first is set.
    in_unet = isinstance(network, UNet2DConditionModel)
    chosen = {name: with_tangent(name, module.processor, in_unet=in_unet) for name, module in modules.items()}
    for name, module in modules.items():
        module.processor = chosen[name]
    for module in network.modules():
        known = module._forward_pre_hooks.values()
        if isinstance(module, nn.GroupNorm) and normalise_in_own_dtype not in known:
            module.register_forward_pre_hook(normalise_in_own_dtype)


def normalise_in_own_dtype(module: nn.GroupNorm, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Input of a group norm in the dtype of its weights.

    Under autocast on a CPU it would be bf16 beside fp32 weights, which torch's forward mode mixes up. Autocast on CUDA
    does the same by itself; where both agree already nothing happens.
    """
    (x,) = inputs
    return (x if module.weight is None else x.to(module.weight.dtype),)


def with_tangent(name: str, processor: Any, *, in_unet: bool) -> Any:
    """The processor itself if it has forward mode, or what takes its place."""
    kind = type(processor)
    if kind in KEPT or hasattr(kind, FUSED_TANGENT):
        return processor
    # Elsewhere than in U-Nets the same processor is given masks that differ between queries, too.
    if kind in REPLACEMENTS and (in_unet or kind is not AttnProcessor2_0):
        return REPLACEMENTS[kind]()
    # All of these come down to torch's fused attention, by diffusers' dispatcher or at once.
    if not FUSED_CALLS & set(kind.__call__.__code__.co_names):
        known = ", ".join(stock.__name__ for stock in REPLACEMENTS)
        raise ValueError(
            f"{name} is a {kind.__name__}, which has no counterpart with tangents; known ones are {known}, and those "
            "of diffusers' attention dispatcher. Set the network's default attention processors first, or take the "
            "tangent by finite differences"
        )
    backend, parallel = (getattr(processor, name, None) for name in ("_attention_backend", "_parallel_config"))
    if backend is not None or parallel is not None:
        raise ValueError(
            f"{name} has the attention backend {backend} or context parallelism of diffusers, "
            "which has no tangent: call the network's reset_attention_backend(), or do without context parallelism"
        )
    return with_fused_tangent(processor)


@dataclass(frozen=True)
class DenoiserJvpCheck:
    """Tangents of a velocity against central differences, one direction each; a tangent is their sum.

    Attributes:
        state: along dx at fixed time.
        time: along dt at fixed state.
    """

    state: JvpCheck
    time: JvpCheck


def check_denoiser_jvp(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    *,
    r: Tensor | None = None,
    dx: Tensor | None = None,
    dt: Tensor | None = None,
    tolerance: float | None = None,
) -> DenoiserJvpCheck:
    """Check both parts of the tangent d velocity / d (x_t, t) along (dx, dt) before a training run rests on it.

    Takes some sixty calls of a small batch. Differences in half precision find gross mistakes alone.

    Args:
        denoiser: prepared by `use_jvp_attention`, in the mode (train or eval) in which it will be used.
        x_t: [B, C, h, w].
        t: [B], not close to 0 or 1, for steps go to both sides.
        condition: batch B.
        r: [B] the time at which the velocity's average ends, for a network of two times; it stands still. None is t.
        dx: like x_t; None is the velocity, the direction of the sampler's path.
        dt: like t; None is one.
        tolerance: see `check_jvp`.

    Raises:
        ValueError: as `check_jvp`, with the direction named.
    """
    dtype = network_dtype(denoiser.network)
    # A trainer with mixed precision has put autocast around the call of this very module. The tangent is checked
    # without it, in the precision of the weights: bf16's own rounding is forty times what the check allows.
    call = partial(Denoiser.forward, denoiser)
    wide = torch.promote_types(dtype, torch.float32)
    x_t, t = x_t.to(wide), t.to(wide)
    with torch.no_grad():
        dx = call(x_t, t, condition, r) if dx is None else dx.to(wide)
    dt = torch.ones_like(t) if dt is None else dt.to(wide)

    def check(
        name: str, directions: tuple[Tensor | None, Tensor | None], largest_step: float, halvings: int
    ) -> JvpCheck:
        try:
            return check_jvp(
                lambda x, time: call(x, time, condition, r),
                (x_t, t),
                directions,
                tolerance=tolerance,
                dtype=dtype,
                largest_step=largest_step,
                halvings=halvings,
            )
        except ValueError as error:
            raise ValueError(f"along {name}: {error}") from error

    # A network that is told 1000 t turns on a scale of a thousandth. Steps below a millionth would see the flat places
    # of a family that rounds its timestep, and call a lost tangent right. In half precision only large steps stand out.
    largest, halvings = (2.0**-2, 14) if dtype in (torch.bfloat16, torch.float16) else (2.0**-8, 10)
    return DenoiserJvpCheck(
        state=check("the state", (dx, None), 2.0**-3, 12), time=check("time", (None, dt), largest, halvings)
    )
