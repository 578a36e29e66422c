"""A diffusers network that speaks rectified flow: teacher, fake score and student are this class in three roles.

Legend: B batch; x_t, velocity, x0 [B, C, h, w]; t [B] in [0, 1], 1 is noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.families.family import Family, network_dtype
from fewstep.core.networks.shared import beside
from fewstep.core.paths import expand_time, x0_from_velocity
from fewstep.core.two_time import network_times


class Denoiser(nn.Module):
    """A network and the family that says how to call it.

    Everything around the network is fp32, fp64 where the network is: x_t, t and what follows from them are cast to the
    network's dtype only as its inputs, and the velocity comes back in fp32 or fp64.

    Args:
        network: the transformer or U-Net of a diffusers pipeline; the family prepares it in place.
        family: see `build_family`.
    """

    def __init__(self, network: nn.Module, family: Family) -> None:
        super().__init__()
        family.prepare_network(network)
        self.network = network
        self.family = family

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None) -> Tensor:
        """velocity = eps - x0, [B, C, h, w], fp32 or fp64.

        A network of two times (`add_second_time`) gives the average velocity from t down to r [B]; None is r = t.
        """
        dtype = torch.promote_types(network_dtype(self.network), torch.float32)
        times = network_times(self.network, t.to(dtype), None if r is None else r.to(dtype))
        return self.family.velocity(self.network, x_t.to(dtype), times, condition)

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x0 = x_t - t velocity, fp32 or fp64."""
        velocity = self(x_t, t, condition)
        return x0_from_velocity(x_t.to(velocity.dtype), velocity, t.to(velocity.dtype))

    def velocity_and_features(
        self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The velocity, and the features [B, C, N] of the family's `feature_modules` from the same call.

        Raises:
            ValueError: the network has no such blocks.
        """
        modules = self.family.feature_modules(self.network, blocks)
        captured: list[Tensor | None] = [None] * len(modules)

        def capture(place: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                captured[place] = self.family.feature_map(output, tuple(x_t.shape[1:]))

            return hook

        handles = [module.register_forward_hook(capture(place)) for place, module in enumerate(modules)]
        try:
            velocity = self.forward(x_t, t, condition)
        finally:
            for handle in handles:
                handle.remove()
        features = [feature for feature in captured if feature is not None]
        assert len(features) == len(modules), "a feature module was not called by its network"
        return velocity, features

    def copy(self, *, trainable: bool = True) -> Denoiser:
        """A copy with its own weights; all of them require gradients, or none. The family is shared."""
        network = copy.deepcopy(self.network)
        network.requires_grad_(trainable)
        return Denoiser(network, self.family)

    def beside(self) -> Denoiser:
        """A denoiser on the same frozen weights, with copies of those that are trained; the family is shared."""
        return Denoiser(beside(self.network), self.family)


# (unconditional, conditional, scale) -> guided, see `Family.combine`.
Combine: TypeAlias = Callable[[Tensor, Tensor, float | Tensor], Tensor]


def plain_combination(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + scale (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def guided_velocity(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    null_condition: Condition,
    guidance: float | Tensor,
    combine: Combine = plain_combination,
    *,
    control_guidance: float | None = None,
) -> Tensor:
    """Classifier-free guidance u + guidance (c - u), where 1 is none (arXiv:2207.12598, Eq. 6, with w = guidance - 1).

    One network call: on the doubled batch [unconditional, conditional], or on the batch itself when guidance is 1. The
    size that SDXL is told belongs to the picture and not to the prompt, so the unconditional side is told the same; so
    it is with an embedded guidance and with given pictures (`FieldRule.of_sample`).

    Args:
        denoiser: a `Denoiser` or a wrapper with its call.
        x_t: [B, C, h, w].
        t: [B].
        condition: batch B.
        null_condition: batch 1 or B.
        guidance: any number, or [B] of them.
        combine: how the two velocities and the scale become one (`Family.combine`).
        control_guidance: of `Condition.control` beside the guidance of the text, by a call more, in which it is zeros:
            v(0, 0) + w (v(c, 0) - v(0, 0)) + w' (v(c, k) - v(c, 0)) for text c and controls k, exact where the two are
            independent given x_t. None: all sides have the controls.

    Raises:
        ValueError: the two conditions do not fit together.
    """
    if control_guidance is not None and condition.control is not None:
        off = condition.with_control(torch.zeros_like(condition.control))
        controlled = denoiser(x_t, t, condition)
        plain = denoiser(x_t, t, off)
        text = plain
        if isinstance(guidance, Tensor) or guidance != 1:
            null = null_condition.expand(condition.batch_size).of_same_samples(off)
            scale = expand_time(guidance, x_t) if isinstance(guidance, Tensor) else guidance
            text = combine(denoiser(x_t, t, null), plain, scale)
        return text + control_guidance * (controlled - plain)
    if not isinstance(guidance, Tensor) and guidance == 1:
        return denoiser(x_t, t, condition)
    null_condition = null_condition.expand(condition.batch_size).of_same_samples(condition)
    both = Condition.cat([null_condition, condition])
    unconditional, conditional = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    scale = expand_time(guidance, x_t) if isinstance(guidance, Tensor) else guidance
    return combine(unconditional, conditional, scale)
