"""Noise paths, and the conversions between them and rectified flow.

Every path is x = alpha(time) x0 + sigma(time) eps. Two paths are the same process up to a change of time and a scale of
x, so a state moves between them by matching sigma / alpha and rescaling; x0 and eps do not change (EDM,
arXiv:2206.00364, Sec. 2 and App. C).

Legend: B batch, F frames. x0, eps, x, velocity are [B, ...]; time is [B], or [B, F] beside a video x [B, C, F, H, W].
Results are fp32 at least, fp64 where an input is fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoisePath(Protocol):
    """Coefficients of a path x = alpha x0 + sigma eps as functions of its own time, elementwise on a time tensor.

    `alpha_dot` and `sigma_dot` are derivatives with respect to the path's own time. `to_flow_time` gives
    t = sigma / (alpha + sigma) in [0, 1] and `from_flow_time` is its inverse. `scale_at_flow_time` is alpha + sigma as
    a function of t: the factor between the state of the path and the canonical state, x = (alpha + sigma) x_t.
    """

    def alpha(self, time: Tensor) -> Tensor: ...

    def sigma(self, time: Tensor) -> Tensor: ...

    def alpha_dot(self, time: Tensor) -> Tensor: ...

    def sigma_dot(self, time: Tensor) -> Tensor: ...

    def to_flow_time(self, time: Tensor) -> Tensor: ...

    def from_flow_time(self, t: Tensor) -> Tensor: ...

    def scale_at_flow_time(self, t: Tensor) -> Tensor: ...


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor itself in fp32 or fp64, otherwise an fp32 copy."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class RectifiedFlow:
    """The canonical path: alpha = 1 - t, sigma = t, t in [0, 1] (arXiv:2209.03003, Eq. 1, with data at t = 0)."""

    def alpha(self, time: Tensor) -> Tensor:
        return 1 - at_least_fp32(time)

    def sigma(self, time: Tensor) -> Tensor:
        return at_least_fp32(time)

    def alpha_dot(self, time: Tensor) -> Tensor:
        return torch.full_like(at_least_fp32(time), -1.0)

    def sigma_dot(self, time: Tensor) -> Tensor:
        return torch.ones_like(at_least_fp32(time))

    def to_flow_time(self, time: Tensor) -> Tensor:
        return at_least_fp32(time)

    def from_flow_time(self, t: Tensor) -> Tensor:
        return at_least_fp32(t)

    def scale_at_flow_time(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_fp32(t))


@dataclass(frozen=True)
class TrigFlow:
    """alpha = cos(time), sigma = sin(time), time in [0, pi/2] (sCM, arXiv:2410.11081, Sec. 3.1, unit data scale)."""

    def alpha(self, time: Tensor) -> Tensor:
        return torch.cos(at_least_fp32(time))

    def sigma(self, time: Tensor) -> Tensor:
        return torch.sin(at_least_fp32(time))

    def alpha_dot(self, time: Tensor) -> Tensor:
        return -torch.sin(at_least_fp32(time))

    def sigma_dot(self, time: Tensor) -> Tensor:
        return torch.cos(at_least_fp32(time))

    def to_flow_time(self, time: Tensor) -> Tensor:
        alpha, sigma = self.alpha(time), self.sigma(time)
        return sigma / (alpha + sigma)

    def from_flow_time(self, t: Tensor) -> Tensor:
        t = at_least_fp32(t)
        return torch.atan2(t, 1 - t)

    def scale_at_flow_time(self, t: Tensor) -> Tensor:
        t = at_least_fp32(t)
        return torch.rsqrt((1 - t).square() + t.square())


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = time in [0, inf) (arXiv:2206.00364). `from_flow_time(1)` is inf: no state is pure noise."""

    def alpha(self, time: Tensor) -> Tensor:
        return torch.ones_like(at_least_fp32(time))

    def sigma(self, time: Tensor) -> Tensor:
        return at_least_fp32(time)

    def alpha_dot(self, time: Tensor) -> Tensor:
        return torch.zeros_like(at_least_fp32(time))

    def sigma_dot(self, time: Tensor) -> Tensor:
        return torch.ones_like(at_least_fp32(time))

    def to_flow_time(self, time: Tensor) -> Tensor:
        time = at_least_fp32(time)
        return time / (1 + time)

    def from_flow_time(self, t: Tensor) -> Tensor:
        t = at_least_fp32(t)
        return t / (1 - t)

    def scale_at_flow_time(self, t: Tensor) -> Tensor:
        return 1 / (1 - at_least_fp32(t))


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """alpha^2 = alphas_cumprod, sigma^2 = 1 - alphas_cumprod, time = table index (DDPM, arXiv:2006.11239, Eq. 4).

    A fractional time interpolates log(sigma / alpha) linearly between its neighbours, so integer times give the table
    itself. Times lie in [0, T - 1]; beyond that alpha and sigma continue the outermost interval. The derivatives are
    one-sided at integer times (from the right; from the left at T - 1).

    The table ends short of pure noise and of clean data. `from_flow_time` clamps to [0, T - 1], since the network knows
    no other time, while `scale_at_flow_time` keeps the norm of the state at the t that was asked for; the two agree
    inside `flow_time_range`.

    Attributes:
        alphas_cumprod: [T], strictly decreasing in (0, 1); kept as fp64.

    Raises:
        ValueError: the table is not one-dimensional with at least two entries, strictly decreasing inside (0, 1).
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().double()
        if table.ndim != 1 or table.numel() < 2:
            raise ValueError(f"alphas_cumprod must be [T] with T >= 2, got shape {tuple(table.shape)}")
        inside = bool(((table > 0) & (table < 1)).all())
        if not inside or not bool((table[1:] < table[:-1]).all()):
            raise ValueError(
                f"alphas_cumprod must fall strictly inside (0, 1), got {table[0]:.6g} ... {table[-1]:.6g}. "
                "A table with zero terminal SNR needs a small positive last entry, such as 2 ** -24."
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @staticmethod
    def from_betas(betas: Tensor) -> VariancePreserving:
        """The path whose table is cumprod(1 - betas), betas [T] in (0, 1)."""
        return VariancePreserving(torch.cumprod(1 - betas.double(), dim=0))

    def to(self, device: torch.device | str) -> VariancePreserving:
        """The same path with its table on `device`, which saves a copy at each call."""
        return VariancePreserving(self.alphas_cumprod.to(device))

    @property
    def flow_time_range(self) -> tuple[float, float]:
        """Smallest and largest canonical time that the table holds."""
        ends = torch.sigmoid(self._log_ratio_table()[[0, -1]])
        return float(ends[0]), float(ends[1])

    def alpha(self, time: Tensor) -> Tensor:
        ratio, _ = self._log_ratio(time)
        return torch.sigmoid(-2 * ratio).sqrt().to(at_least_fp32(time).dtype)

    def sigma(self, time: Tensor) -> Tensor:
        ratio, _ = self._log_ratio(time)
        return torch.sigmoid(2 * ratio).sqrt().to(at_least_fp32(time).dtype)

    def alpha_dot(self, time: Tensor) -> Tensor:
        ratio, slope = self._log_ratio(time)
        value = -torch.sigmoid(-2 * ratio).sqrt() * torch.sigmoid(2 * ratio) * slope
        return value.to(at_least_fp32(time).dtype)

    def sigma_dot(self, time: Tensor) -> Tensor:
        ratio, slope = self._log_ratio(time)
        value = torch.sigmoid(2 * ratio).sqrt() * torch.sigmoid(-2 * ratio) * slope
        return value.to(at_least_fp32(time).dtype)

    def to_flow_time(self, time: Tensor) -> Tensor:
        ratio, _ = self._log_ratio(time)
        return torch.sigmoid(ratio).to(at_least_fp32(time).dtype)

    def from_flow_time(self, t: Tensor) -> Tensor:
        table = self._log_ratio_table().to(t.device)
        ratio = torch.logit(t.double()).clamp(table[0], table[-1])
        index = (torch.searchsorted(table, ratio.contiguous(), right=True) - 1).clamp(0, table.numel() - 2)
        time = index + (ratio - table[index]) / (table[index + 1] - table[index])
        return time.to(at_least_fp32(t).dtype)

    def scale_at_flow_time(self, t: Tensor) -> Tensor:
        t = at_least_fp32(t)
        return torch.rsqrt((1 - t).square() + t.square())

    def _log_ratio_table(self) -> Tensor:
        """log(sigma / alpha) of the table, [T], increasing."""
        return -0.5 * torch.logit(self.alphas_cumprod)

    def _log_ratio(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """log(sigma / alpha) and its slope in time. fp64, for fp32 loses the last digits of a fractional time."""
        table = self._log_ratio_table().to(time.device)
        time = time.double()
        index = time.detach().floor().long().clamp(0, table.numel() - 2)
        slope = table[index + 1] - table[index]
        return table[index] + (time - index) * slope, slope


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """View a time so that it broadcasts over x: [B] to [B, 1, ...]; [B, F] to [B, 1, F, 1, 1]. fp32 at least.

    Raises:
        ValueError: t is neither [B] nor, for x [B, C, F, H, W], [B, F] (a batch of 1 broadcasts).
    """
    if t.ndim == 1 and t.shape[0] in (1, x.shape[0]):
        return at_least_fp32(t).view(-1, *([1] * (x.ndim - 1)))
    if t.ndim == 2 and x.ndim == 5 and t.shape[0] in (1, x.shape[0]) and t.shape[1] == x.shape[2]:
        return at_least_fp32(t).view(t.shape[0], 1, t.shape[1], 1, 1)
    raise ValueError(
        f"time of shape {tuple(t.shape)} does not fit x of shape {tuple(x.shape)}: "
        "give [B], or [B, F] for a video [B, C, F, H, W]"
    )


def add_noise(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps."""
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * eps


def x0_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t velocity."""
    return x_t - expand_time(t, x_t) * velocity


def eps_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """eps = x_t + (1 - t) velocity."""
    return x_t + (1 - expand_time(t, x_t)) * velocity


def velocity_from_x0(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """velocity = (x_t - x0) / t. Not defined at t = 0, where x0 = x_t says nothing about the velocity (inf or nan)."""
    return (x_t - x0) / expand_time(t, x_t)


def velocity_from_eps(x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """velocity = (eps - x_t) / (1 - t). Not defined at t = 1, where eps = x_t says nothing about it (inf or nan)."""
    return (eps - x_t) / (1 - expand_time(t, x_t))


def score_from_velocity(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """score = -eps / t = -(x_t + (1 - t) velocity) / t. Diverges at t = 0."""
    return -eps_from_velocity(x_t, velocity, t) / expand_time(t, x_t)


def velocity_from_score(x_t: Tensor, score: Tensor, t: Tensor) -> Tensor:
    """velocity = -(x_t + t score) / (1 - t). Not defined at t = 1 (inf or nan)."""
    t = expand_time(t, x_t)
    return -(x_t + t * score) / (1 - t)


def path_add_noise(path: NoisePath, x0: Tensor, eps: Tensor, time: Tensor) -> Tensor:
    """x = alpha x0 + sigma eps, the state of `path` at its own `time`."""
    return expand_time(path.alpha(time), x0) * x0 + expand_time(path.sigma(time), x0) * eps


def to_flow_state(path: NoisePath, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The canonical state (x_t, t) of a state of `path`: t = sigma / (alpha + sigma), x_t = x / (alpha + sigma)."""
    return x / expand_time(path.alpha(time) + path.sigma(time), x), path.to_flow_time(time)


def from_flow_state(path: NoisePath, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The state (x, time) of `path` for a canonical state: x = (alpha + sigma) x_t. Inverse of `to_flow_state`.

    EDM at t = 1 gives inf. `VariancePreserving` clamps the time, not the scale, outside its `flow_time_range`.
    """
    return x_t * expand_time(path.scale_at_flow_time(t), x_t), path.from_flow_time(t)


def velocity_from_path_eps(path: NoisePath, x: Tensor, eps: Tensor, time: Tensor) -> Tensor:
    """Canonical velocity at the canonical state, from an eps prediction at x: ((alpha + sigma) eps - x) / alpha.

    Not defined where alpha = 0 (inf or nan).
    """
    alpha, sigma = _coefficients(path, x, time)
    return ((alpha + sigma) * eps - x) / alpha


def velocity_from_path_x0(path: NoisePath, x: Tensor, x0: Tensor, time: Tensor) -> Tensor:
    """Canonical velocity at the canonical state, from an x0 prediction at x: (x - (alpha + sigma) x0) / sigma.

    Not defined where sigma = 0 (inf or nan).
    """
    alpha, sigma = _coefficients(path, x, time)
    return (x - (alpha + sigma) * x0) / sigma


def velocity_from_path_v(path: NoisePath, x: Tensor, v: Tensor, time: Tensor) -> Tensor:
    """Canonical velocity at the canonical state, from v = alpha eps - sigma x0 at x (arXiv:2202.00512, App. D).

    ((sigma - alpha) x + (alpha + sigma) v) / (alpha^2 + sigma^2): finite at every time of the path.
    """
    alpha, sigma = _coefficients(path, x, time)
    return ((sigma - alpha) * x + (alpha + sigma) * v) / (alpha.square() + sigma.square())


def path_v_from_velocity(path: NoisePath, x_t: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """v = alpha eps - sigma x0 of `path` at `time`, from the canonical state and velocity there."""
    alpha, sigma = _coefficients(path, x_t, time)
    t = path.to_flow_time(time)
    return alpha * eps_from_velocity(x_t, velocity, t) - sigma * x0_from_velocity(x_t, velocity, t)


def velocity_from_path_velocity(path: NoisePath, x: Tensor, path_velocity: Tensor, time: Tensor) -> Tensor:
    """Canonical velocity from dx / dtime = alpha_dot x0 + sigma_dot eps along `path`.

    ((alpha + sigma) dx/dtime - (alpha_dot + sigma_dot) x) / (alpha sigma_dot - sigma alpha_dot).
    """
    alpha, sigma = _coefficients(path, x, time)
    alpha_dot, sigma_dot = expand_time(path.alpha_dot(time), x), expand_time(path.sigma_dot(time), x)
    return ((alpha + sigma) * path_velocity - (alpha_dot + sigma_dot) * x) / (alpha * sigma_dot - sigma * alpha_dot)


def path_velocity_from_velocity(path: NoisePath, x_t: Tensor, velocity: Tensor, time: Tensor) -> Tensor:
    """dx / dtime = alpha_dot x0 + sigma_dot eps along `path`, from the canonical state and velocity at `time`."""
    t = path.to_flow_time(time)
    x0, eps = x0_from_velocity(x_t, velocity, t), eps_from_velocity(x_t, velocity, t)
    return expand_time(path.alpha_dot(time), x_t) * x0 + expand_time(path.sigma_dot(time), x_t) * eps


def flow_time_dot(path: NoisePath, time: Tensor) -> Tensor:
    """dt / dtime = (alpha sigma_dot - sigma alpha_dot) / (alpha + sigma)^2, [B]: the chain rule between two times."""
    alpha, sigma = path.alpha(time), path.sigma(time)
    return (alpha * path.sigma_dot(time) - sigma * path.alpha_dot(time)) / (alpha + sigma).square()


def _coefficients(path: NoisePath, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    return expand_time(path.alpha(time), x), expand_time(path.sigma(time), x)
