"""Random times as functions of uniform numbers: at which networks are compared, trained, or told real from fake.

Shapes: u, t [B]; u in [0, 1), t canonical.
"""

from __future__ import annotations

from typing import Protocol

import torch
from scipy.special import betainc, betaincinv
from torch import Tensor

from fewstep.core.grids import shift_time, unshift_time
from fewstep.core.paths import at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.settings import TimeLawConfig


class Clock(Protocol):
    """What a law in timesteps asks of a family."""

    @property
    def last_timestep(self) -> float: ...

    def flow_time(self, timestep: Tensor) -> Tensor: ...


def draw_times(draw: Draw, stream: str, law: TimeLawConfig, clock: Clock) -> Tensor:
    """Times of a batch; `clock` is the family, which knows the time of a timestep."""
    return law_times(draw.uniform(stream), law, clock)


def law_times(u: Tensor, law: TimeLawConfig, clock: Clock) -> Tensor:
    """The times that uniform numbers stand for: increasing in u.

    uniform: shift(u); logit_normal: shift(sigmoid(mean + std z)) with u the normal distribution of z (SD3,
    arXiv:2403.03206, Eq. 19); beta: shift(b) with u the beta distribution of b. Values outside of [min, max] are moved
    to its ends, or never drawn (`ends: truncate`). In timesteps each whole one from min to max is as likely as any
    other, which on a noise table is another law than uniform times: DMD2's of Stable Diffusion.
    """
    if law.unit == "timestep":
        if law.max > clock.last_timestep:
            raise ValueError(
                f"times up to timestep {law.max:g}, and the network knows them up to {clock.last_timestep:g}"
            )
        steps = (law.min + torch.floor(u.double() * (law.max - law.min + 1))).clamp(max=law.max)
        return clock.flow_time(steps).to(at_least_fp32(u).dtype)
    if law.ends == "truncate":
        ends = torch.tensor([law.min, law.max], dtype=torch.float64, device=u.device)
        low, high = _distribution(unshift_time(ends, law.shift), law)
        # fp64 until the end, for a normal number close to its distribution's ends.
        t = unclamped_times(low + u.double() * (high - low), law)
        return t.clamp(law.min, law.max).to(at_least_fp32(u).dtype)
    return unclamped_times(u, law).clamp(law.min, law.max)


def unclamped_times(u: Tensor, law: TimeLawConfig) -> Tensor:
    """The shifted law before its ends, in [0, 1]; of times alone."""
    if law.law == "logit_normal":
        u = torch.sigmoid(law.mean + law.std * torch.special.ndtri(u))
    if law.law == "beta":
        drawn = betaincinv(law.alpha, law.beta, u.double().cpu().numpy())
        u = torch.as_tensor(drawn, dtype=u.dtype).to(u.device)
    return shift_time(u, law.shift)


def law_interval(law: TimeLawConfig, clock: Clock) -> tuple[float, float]:
    """Smallest and largest canonical time that is drawn."""
    if law.unit == "time":
        return law.min, law.max
    ends = clock.flow_time(torch.tensor([law.min, law.max], dtype=torch.float64)).tolist()
    return ends[0], ends[1]


def _distribution(t: Tensor, law: TimeLawConfig) -> Tensor:
    """P(unshifted time <= t)."""
    if law.law == "uniform":
        return t
    if law.law == "beta":
        return torch.as_tensor(betainc(law.alpha, law.beta, t.double().cpu().numpy())).to(t)
    return torch.special.ndtr((torch.logit(t) - law.mean) / law.std)
