"""TrigFlow coordinates, and the exact change between them and rectified flow.

TrigFlow (sCM, arXiv:2410.11081) noises data by a rotation, with noise of the data's own scale:

    x_tau = cos(tau) x0 + sin(tau) sigma_data eps,   tau in [0, pi/2]
    dx_tau / dtau = sigma_data F(x_tau, tau),         F* = cos(tau) eps - sin(tau) x0 / sigma_data
    f(x_tau, tau) = cos(tau) x_tau - sin(tau) sigma_data F,   so f(x, 0) = x

x0 and eps are those of rectified flow, so tan(tau) = t / (sigma_data (1 - t)), and with Z = cos + sigma_data sin

    x_tau = Z x_t,   t = sigma_data sin / Z,   dt/dtau = sigma_data / Z^2
    F = (cos - sin / sigma_data) x_t + v / Z

which is the conversion of SANA-Sprint (arXiv:2503.09641) with its latents divided by sigma_data: take
sigma_data = 1 for it. No formula here divides by sin or cos, so both ends of the path are finite.

Legend: B batch; x_tau, x_t, F (`trig`), velocity, x0, eps are [B, ...]; tau, t are [B]. Angles are always named tau.
fp32 at least, fp64 where an input is fp64. Every function is differentiable, in forward mode too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.paths import NoisePath, at_least_fp32, expand_time, from_flow_state, to_flow_state

VelocityFunction = Callable[[Tensor, Tensor], Tensor]


def angle_from_time(t: Tensor, sigma_data: float = 1.0) -> Tensor:
    """tau = atan(t / (sigma_data (1 - t))), of any shape; t = 1 gives pi/2.

    Raises:
        ValueError: sigma_data is not positive and finite. So in all functions of this file.
    """
    _require_scale(sigma_data)
    t = at_least_fp32(t)
    return torch.atan2(t, sigma_data * (1 - t))


def time_from_angle(tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """t = sigma_data sin / (cos + sigma_data sin), of any shape. Inverse of `angle_from_time`."""
    _require_scale(sigma_data)
    tau = at_least_fp32(tau)
    noise = sigma_data * torch.sin(tau)
    # pi/2 in fp32 lies above pi/2, where the cosine is -4e-8 and t would exceed 1. A constant takes that back; a clamp
    # would take the derivative with it.
    below_zero = min(0.0, math.cos(float(torch.tensor(math.pi / 2, dtype=tau.dtype))))
    return noise / (torch.cos(tau) - below_zero + noise)


def state_scale(tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Z = cos + sigma_data sin, of any shape: x_tau = Z x_t, dt/dtau = sigma_data / Z^2."""
    _require_scale(sigma_data)
    tau = at_least_fp32(tau)
    return torch.cos(tau) + sigma_data * torch.sin(tau)


def add_trig_noise(x0: Tensor, eps: Tensor, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """x_tau = cos x0 + sin sigma_data eps; eps is standard normal."""
    _require_scale(sigma_data)
    tau = expand_time(tau, x0)
    return torch.cos(tau) * x0 + torch.sin(tau) * sigma_data * eps


def trig_target(x0: Tensor, eps: Tensor, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """F* = cos eps - sin x0 / sigma_data: what F is on one pair of data and noise (training without a teacher)."""
    _require_scale(sigma_data)
    tau = expand_time(tau, x0)
    return torch.cos(tau) * eps - torch.sin(tau) * x0 / sigma_data


def to_trig_state(x_t: Tensor, t: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """(x_tau, tau) of a canonical state."""
    tau = angle_from_time(t, sigma_data)
    return expand_time(state_scale(tau, sigma_data), x_t) * x_t, tau


def from_trig_state(x_tau: Tensor, tau: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """The canonical state (x_t, t). Inverse of `to_trig_state`."""
    return x_tau / expand_time(state_scale(tau, sigma_data), x_tau), time_from_angle(tau, sigma_data)


def path_to_trig_state(path: NoisePath, x: Tensor, time: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """(x_tau, tau) of a state of any noise path at its own time: EDM has tau = atan(sigma / sigma_data)."""
    return to_trig_state(*to_flow_state(path, x, time), sigma_data)


def trig_to_path_state(path: NoisePath, x_tau: Tensor, tau: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """The state (x, time) of `path`. Inverse of `path_to_trig_state`; limits at the ends as in `from_flow_state`."""
    return from_flow_state(path, *from_trig_state(x_tau, tau, sigma_data))


def trig_from_velocity(x_t: Tensor, velocity: Tensor, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """F at x_tau from the canonical velocity at the same state, F = (cos - sin / sigma_data) x_t + velocity / Z.

    Args:
        x_t: [B, ...] canonical state, x_tau / Z.
        velocity: [B, ...] canonical velocity at (x_t, t).
        tau: [B] the angle of t.
        sigma_data: standard deviation of the data.
    """
    angle = expand_time(tau, x_t)
    scale = state_scale(angle, sigma_data)
    return (torch.cos(angle) - torch.sin(angle) / sigma_data) * x_t + velocity / scale


def velocity_from_trig(x_t: Tensor, trig: Tensor, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """Canonical velocity at (x_t, t) from F. Inverse of `trig_from_velocity`: Z (F - (cos - sin / sigma_data) x_t)."""
    angle = expand_time(tau, x_t)
    scale = state_scale(angle, sigma_data)
    return scale * (trig - (torch.cos(angle) - torch.sin(angle) / sigma_data) * x_t)


def x0_from_trig(x_tau: Tensor, trig: Tensor, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """cos x_tau - sin sigma_data F: the consistency function f of a consistency network, x0 of a diffusion network.

    arXiv:2410.11081. The number equals x_t - t velocity in canonical coordinates.
    """
    _require_scale(sigma_data)
    angle = expand_time(tau, x_tau)
    return torch.cos(angle) * x_tau - torch.sin(angle) * sigma_data * trig


def eps_from_trig(x_tau: Tensor, trig: Tensor, tau: Tensor, sigma_data: float = 1.0) -> Tensor:
    """(sin x_tau + cos sigma_data F) / sigma_data: the standard normal noise that x_tau holds."""
    _require_scale(sigma_data)
    angle = expand_time(tau, x_tau)
    return torch.sin(angle) * x_tau / sigma_data + torch.cos(angle) * trig


def trig_function(velocity_function: VelocityFunction, sigma_data: float = 1.0) -> VelocityFunction:
    """(x_tau, tau) -> F for a network (x_t, t) -> velocity; torch.func.jvp passes if it passes through the network.

    x_tau is the state itself, not divided by sigma_data. The network receives t in the dtype of tau (fp32 at least):
    whatever it casts t to afterwards is beyond this function.
    """
    _require_scale(sigma_data)

    def function(x_tau: Tensor, tau: Tensor) -> Tensor:
        x_t, t = from_trig_state(x_tau, tau, sigma_data)
        return trig_from_velocity(x_t, velocity_function(x_t, t), tau, sigma_data)

    return function


def _require_scale(sigma_data: float) -> None:
    if not (sigma_data > 0 and math.isfinite(sigma_data)):
        raise ValueError(f"sigma_data must be positive and finite, got {sigma_data}; 1 is data of unit variance")
