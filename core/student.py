"""The few-step generator: a denoiser, the times at which it is called, and what happens between the calls.

Legend: B batch; noise, x_t, x0 [B, C, h, w]; t [B]; K number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition
from fewstep.core.denoiser import Denoiser
from fewstep.core.grids import validate_grid
from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.run_settings import Sampler


@dataclass(frozen=True)
class RolloutOutput:
    """The last step of a rollout: its prediction x0 (with graph), and the x_t (without) and t [B] it was called at."""

    x0: Tensor
    x_t: Tensor
    t: Tensor


class Student:
    """A few-step sampler. From x at times[i] the network gives x0 and velocity; the next state at t' = times[i + 1] is

        sde: (1 - t') x0 + t' n with fresh noise n (DMD2, arXiv:2405.14867, Sec. 4.4; LCM, arXiv:2310.04378, Alg. 3)
        ode: x + (t' - t) velocity, an Euler step
        flow_map: x + (t' - t) u(x, t, t'), the jump of a network of two times (MeanFlow, arXiv:2505.13447), t' = 0 at
            the end; exact for an exact network, whatever the times are

    and the last x0 is the sample.

    Args:
        denoiser: `Denoiser`, or a module that is called like one; a grid that starts below 1 needs its family.
        times: K strictly decreasing times in (0, 1]; the final 0 is left out.
        sampler: see above; train with the one that is deployed.

    Raises:
        ValueError: the times are no grid, or the sampler is unknown.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float], sampler: Sampler = "sde") -> None:
        validate_grid(times)
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler must be {' or '.join(get_args(Sampler))}, got {sampler!r}")
        self.denoiser = denoiser
        self.times = tuple(times)
        self.sampler: Sampler = sampler

    @property
    def grid_text(self) -> str:
        """The times, as text."""
        return ", ".join(f"{time:.6g}" for time in self.times)

    def rollout(
        self,
        noise: Tensor,
        condition: Condition,
        renoise: Sequence[Tensor] = (),
        grad_step: int | None = None,
        denoiser: nn.Module | None = None,
    ) -> RolloutOutput:
        """Steps 0 ... grad_step; only the call at `grad_step` builds a graph (backward simulation, DMD2, Sec. 4.4).

        A flow map jumps from there to 0 in one.

        Args:
            noise: [B, C, h, w], standard normal, as the stock pipeline takes it.
            condition: batch B.
            renoise: entry i, [B, C, h, w], is the fresh noise after step i; the others use none.
            grad_step: 0 ... K - 1; None is the last step.
            denoiser: called in place of the own one at `grad_step`, for instance its DDP wrapper.

        Raises:
            ValueError: there is no such step, or too little noise.
        """
        last = len(self.times) - 1 if grad_step is None else grad_step
        if not 0 <= last < len(self.times):
            raise ValueError(f"grad_step must be from 0 to {len(self.times) - 1}, got {grad_step}")
        if self.sampler == "sde" and len(renoise) < last:
            raise ValueError(f"{last + 1} steps with renoising need {last} noise tensors, got {len(renoise)}")
        with torch.no_grad():
            x_t = self._initial_state(noise)
            for i in range(last):
                x_t = self._step(x_t, condition, i, renoise)
        t = self._time(x_t, last)
        called = self.denoiser if denoiser is None else denoiser
        if self.sampler == "flow_map":
            velocity = called(x_t, t, condition, torch.zeros_like(t))
        else:
            velocity = called(x_t, t, condition)
        return RolloutOutput(x0_from_velocity(x_t.to(velocity.dtype), velocity, t), x_t, t)

    @torch.no_grad()
    def sample(self, noise: Tensor, condition: Condition, renoise: Sequence[Tensor] = ()) -> Tensor:
        """Latents [B, C, h, w] after all K steps, without gradient; the arguments of `rollout`."""
        return self.rollout(noise, condition, renoise).x0

    def _initial_state(self, noise: Tensor) -> Tensor:
        # At t = 1 noise is the state on every path, so a denoiser without a family will do.
        x_t = noise if self.times[0] == 1 else self.denoiser.family.initial_state(noise, self.times[0])
        return x_t.to(torch.promote_types(noise.dtype, torch.float32))

    def _time(self, x_t: Tensor, i: int) -> Tensor:
        return torch.full((len(x_t),), self.times[i], dtype=x_t.dtype, device=x_t.device)

    def _step(self, x_t: Tensor, condition: Condition, i: int, renoise: Sequence[Tensor]) -> Tensor:
        t, t_next = self._time(x_t, i), self._time(x_t, i + 1)
        if self.sampler == "flow_map":
            return x_t + (self.times[i + 1] - self.times[i]) * self.denoiser(x_t, t, condition, t_next)
        velocity = self.denoiser(x_t, t, condition)
        if self.sampler == "ode":
            return x_t + (self.times[i + 1] - self.times[i]) * velocity
        return add_noise(x0_from_velocity(x_t, velocity, t), renoise[i].to(x_t), t_next)
