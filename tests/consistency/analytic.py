"""Gaussians, for which velocities, flow maps and consistency functions are closed, in both coordinates.

Data are N(mean, std^2) in each element. Times are floats or tensors that broadcast over x.
`Mixture` of scripts/studies/toy_mixture.py is the teacher for everything that is not linear.
"""

from dataclasses import dataclass

import torch
from studies.toy_mixture import Mixture
from torch import Tensor

Number = float | Tensor
BIMODAL = Mixture((0.4, 0.6), (-1.2, 0.9), (0.35, 0.5))


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2) along rectified flow, and along TrigFlow with noise of scale `sigma_data`."""

    mean: float = 0.7
    std: float = 1.6
    sigma_data: float = 1.0

    def variance(self, t: Number) -> Number:
        """Variance of x_t."""
        return (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x: Tensor, t: Number) -> Tensor:
        return -self.mean + (t - (1 - t) * self.std**2) / self.variance(t) * (x - (1 - t) * self.mean)

    def score(self, x: Tensor, t: Number) -> Tensor:
        return -(x - (1 - t) * self.mean) / self.variance(t)

    def x0(self, x: Tensor, t: Number) -> Tensor:
        return self.mean + (1 - t) * self.std**2 / self.variance(t) * (x - (1 - t) * self.mean)

    def flow_map(self, x: Tensor, t: Number, r: Number) -> Tensor:
        ratio = torch.as_tensor(self.variance(r) / self.variance(t), dtype=x.dtype).sqrt()
        return (1 - r) * self.mean + ratio * (x - (1 - t) * self.mean)

    def consistency(self, x: Tensor, t: Number) -> Tensor:
        return self.flow_map(x, t, 0.0 * t)

    def average_velocity(self, x: Tensor, t: Number, r: Number) -> Tensor:
        """(x - flow_map) / (t - r) without 0/0: 1 - sqrt(q) = (1 - q) / (1 + sqrt(q)), V_t - V_r has factor t - r."""
        v_t, v_r = self.variance(t), self.variance(r)
        root = torch.as_tensor(v_r / v_t, dtype=x.dtype).sqrt()
        slope = ((t + r) - self.std**2 * (2 - t - r)) / (v_t * (1 + root))
        return -self.mean + slope * (x - (1 - t) * self.mean)

    def trig_variance(self, tau: Tensor) -> Tensor:
        return (torch.cos(tau) * self.std) ** 2 + (torch.sin(tau) * self.sigma_data) ** 2

    def trig(self, x: Tensor, tau: Tensor) -> Tensor:
        """F* of the teacher: dx/dtau = sigma_data F*."""
        sin, cos = torch.sin(tau), torch.cos(tau)
        slope = sin * cos * (self.sigma_data**2 - self.std**2) / self.trig_variance(tau)
        return (-sin * self.mean + slope * (x - cos * self.mean)) / self.sigma_data

    def trig_consistency(self, x: Tensor, tau: Tensor) -> Tensor:
        return self.mean + self.std / self.trig_variance(tau).sqrt() * (x - torch.cos(tau) * self.mean)

    def trig_student(self, x: Tensor, tau: Tensor) -> Tensor:
        """F of the network whose consistency function is exact; not the teacher's F*."""
        return (torch.cos(tau) * x - self.trig_consistency(x, tau)) / (self.sigma_data * torch.sin(tau))

    def flow_student(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the network whose consistency function is exact: the average velocity down to 0."""
        return self.average_velocity(x, t, 0.0 * t)


def fp64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
