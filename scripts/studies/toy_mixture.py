"""A mixture of Gaussians in one dimension as a teacher whose every quantity is known.

The velocity is closed; the flow is integrated with Runge-Kutta of fourth order, to any accuracy. x_t and times are
tensors of one shape (or broadcast), in canonical coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Data sum_k weights[k] N(means[k], stds[k]^2); one component is a Gaussian.

    Raises:
        ValueError: lengths differ, weights do not sum to 1, or a standard deviation is not positive.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.weights) == len(self.means) == len(self.stds) or abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError(f"need one mean and std for each weight, weights that sum to 1, got {self}")
        if min(self.weights) <= 0 or min(self.stds) <= 0:
            raise ValueError(f"weights and standard deviations must be positive, got {self}")

    @property
    def std(self) -> float:
        """Standard deviation of the data."""
        mean = sum(w * m for w, m in zip(self.weights, self.means, strict=True))
        second = sum(w * (m * m + s * s) for w, m, s in zip(self.weights, self.means, self.stds, strict=True))
        return math.sqrt(second - mean * mean)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[eps - x0 | x_t]."""
        logits, velocities = [], []
        for weight, mean, std in zip(self.weights, self.means, self.stds, strict=True):
            variance = (1 - t).square() * std**2 + t.square()
            offset = x_t - (1 - t) * mean
            logits.append(math.log(weight) - 0.5 * torch.log(variance) - 0.5 * offset.square() / variance)
            velocities.append(-mean + (t - (1 - t) * std**2) / variance * offset)
        share = torch.softmax(torch.stack(torch.broadcast_tensors(*logits)), dim=0)
        return (share * torch.stack(torch.broadcast_tensors(*velocities))).sum(dim=0)

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]."""
        return x_t - t * self.velocity(x_t, t)

    def flow_map(self, x_t: Tensor, t: Tensor, r: Tensor, *, steps: int = 200) -> Tensor:
        """Where the flow carries x_t from t to r, with `steps` Runge-Kutta steps uniform in the angle of time.

        The angle resolves both ends, where the velocity of a mixture changes fastest.
        """
        start, end = torch.atan2(t, 1 - t), torch.atan2(r, 1 - r)
        step = (end - start) / steps
        x = x_t
        for i in range(steps):
            tau = start + i * step
            k1 = self._angular(x, tau)
            k2 = self._angular(x + step / 2 * k1, tau + step / 2)
            k3 = self._angular(x + step / 2 * k2, tau + step / 2)
            k4 = self._angular(x + step * k3, tau + step)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def consistency(self, x_t: Tensor, t: Tensor, *, steps: int = 200) -> Tensor:
        """f*(x_t, t): the end of the flow at r = 0."""
        return self.flow_map(x_t, t, torch.zeros_like(t), steps=steps)

    def average_velocity(self, x_t: Tensor, t: Tensor, r: Tensor, *, steps: int = 200) -> Tensor:
        """u*(x_t, t, r) = (x_t - flow_map) / (t - r); the velocity itself where r = t."""
        gap = t - r
        moved = (x_t - self.flow_map(x_t, t, r, steps=steps)) / torch.where(gap == 0, torch.ones_like(gap), gap)
        return torch.where(gap == 0, self.velocity(x_t, t), moved)

    def sample(self, component: Tensor, normal: Tensor) -> Tensor:
        """Data from uniform numbers that choose the component, and normal ones."""
        edges = torch.tensor(self.weights, dtype=normal.dtype, device=normal.device).cumsum(0)
        index = torch.bucketize(component, edges[:-1], right=True)
        return _row(self.means, normal)[index] + _row(self.stds, normal)[index] * normal

    def _angular(self, x: Tensor, tau: Tensor) -> Tensor:
        """dx_t / dtau, tan(tau) = t / (1 - t)."""
        scale = torch.cos(tau) + torch.sin(tau)
        return self.velocity(x, torch.sin(tau) / scale) / scale.square()


def _row(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(tuple(values), dtype=like.dtype, device=like.device)
