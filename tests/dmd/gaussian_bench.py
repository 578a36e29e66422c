"""Gaussians, for which distribution matching has closed forms in fp64.

The teacher's data are N(m, s^2) in each element, the student's N(mu, tau^2). With a = 1 - t the states x_t are
N(a m, V), V = a^2 s^2 + t^2. The closed forms are numbered G1 to G15; `test_gaussian_bench.py` holds each of them
against quadrature. Times are floats or tensors that broadcast over x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.core.condition import Condition

Number = float | Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, std^2) as data, and what it is at time t. Values are floats or tensors, so gradients can pass."""

    mean: Number
    std: Number

    def variance(self, t: Number) -> Number:
        """Variance V of x_t."""
        return (1 - t) ** 2 * self.std**2 + t**2

    def x0(self, x_t: Tensor, t: Number) -> Tensor:
        """G1, G2: posterior mean of x0 given x_t, which the exact denoiser predicts."""
        return (self.mean * t**2 + (1 - t) * self.std**2 * x_t) / self.variance(t)

    def velocity(self, x_t: Tensor, t: Number) -> Tensor:
        """G1: (x_t - x0) / t, written without the division."""
        return ((t - (1 - t) * self.std**2) * x_t - t * self.mean) / self.variance(t)

    def score(self, x_t: Tensor, t: Number) -> Tensor:
        """G1: gradient of the log density of x_t."""
        return -(x_t - (1 - t) * self.mean) / self.variance(t)

    def log_density(self, x_t: Tensor, t: Number) -> Tensor:
        """Log density of x_t, elementwise."""
        variance = torch.as_tensor(self.variance(t), dtype=x_t.dtype)
        return -((x_t - (1 - t) * self.mean) ** 2) / (2 * variance) - 0.5 * torch.log(2 * math.pi * variance)

    def sample(self, z: Tensor) -> Tensor:
        """mean + std z."""
        return self.mean + self.std * z


def mean_gradient(student: Gaussian, teacher: Gaussian, t: Number) -> Number:
    """G3: E[d dx/dmu], d = fake x0 - real x0, for an exact fake score."""
    return (student.mean - teacher.mean) * t**2 / teacher.variance(t)


def std_gradient(student: Gaussian, teacher: Gaussian, t: Number) -> Number:
    """G4: E[d dx/dtau]."""
    spread = student.std * (student.std**2 - teacher.std**2)
    return (1 - t) ** 2 * t**2 * spread / (student.variance(t) * teacher.variance(t))


def reverse_kl(student: Gaussian, teacher: Gaussian, t: Number) -> Number:
    """G5: KL(q_t || p_t) of the student's x_t from the teacher's; swap the arguments for the forward KL of G10."""
    ratio = torch.as_tensor(student.variance(t) / teacher.variance(t), dtype=torch.float64)
    shift = (1 - t) ** 2 * (student.mean - teacher.mean) ** 2 / teacher.variance(t)
    return 0.5 * (ratio - 1 - torch.log(ratio) + shift)


def reverse_kl_gradients(student: Gaussian, teacher: Gaussian, t: Number) -> tuple[Number, Number]:
    """G5: derivatives of `reverse_kl` in the student's mean and std; G3 and G4 are t^2 / a^2 times these."""
    v_fake, v_real, a = student.variance(t), teacher.variance(t), 1 - t
    by_std = a**4 * student.std * (student.std**2 - teacher.std**2) / (v_fake * v_real)
    return a**2 * (student.mean - teacher.mean) / v_real, by_std


def normaliser_limit(teacher: Gaussian, t: float) -> float:
    """G7: mean |x - real x0| over many dimensions for a student that equals the teacher."""
    return math.sqrt(2 / math.pi) * t * float(teacher.std) / math.sqrt(float(teacher.variance(t)))


def guided(conditional: Gaussian, unconditional: Gaussian, guidance: float) -> Gaussian:
    """G8: the Gaussian whose denoiser equals u + w (c - u) at every t, for two teachers of one std."""
    shift = (guidance - 1) * (conditional.mean - unconditional.mean)
    return Gaussian(conditional.mean + shift, conditional.std)


def log_ratio(student: Gaussian, teacher: Gaussian, x_t: Tensor, t: Number) -> Tensor:
    """G9: log p_t / q_t, elementwise, which is the optimal discriminator's logit."""
    v_fake, v_real, a = student.variance(t), teacher.variance(t), 1 - t
    squares = (x_t - a * student.mean) ** 2 / (2 * v_fake) - (x_t - a * teacher.mean) ** 2 / (2 * v_real)
    return 0.5 * torch.log(torch.as_tensor(v_fake / v_real, dtype=x_t.dtype)) + squares


def forward_kl_mean_gradient(student: Gaussian, teacher: Gaussian, t: Number) -> Number:
    """G10: derivative of KL(p_t || q_t) in the student's mean; E_q[r a (s_fake - s_real)] equals it."""
    return (1 - t) ** 2 * (student.mean - teacher.mean) / student.variance(t)


def transport(teacher: Gaussian, x: Tensor, t: Number) -> Tensor:
    """G12: the monotone map from the law of x_t to the data, optimal for a student's step at t."""
    root = torch.as_tensor(teacher.variance(t), dtype=x.dtype).sqrt()
    return teacher.mean + teacher.std / root * (x - (1 - t) * teacher.mean)


def subinterval(s: float, t: float) -> tuple[float, float]:
    """G13: (scale, noise level) of x_t = scale x_s + level n, 0 <= s < t < 1."""
    scale = (1 - t) / (1 - s)
    return scale, math.sqrt(t**2 - scale**2 * s**2)


def subinterval_target(x_s: Tensor, noise: Tensor, s: float, t: float) -> Tensor:
    """G13: regression target whose conditional mean given x_t is the velocity of the law of x_s's data."""
    _, level = subinterval(s, t)
    return -x_s / (1 - s) + (t + (1 - t) * s**2 / (1 - s) ** 2) / level * noise


def transition(x_t: Tensor, velocity: Tensor, t: float, s: float, *, eta: float, noise: Tensor) -> Tensor:
    """Step t to s: (1 - s) x0 + s (cos theta eps + sin theta n), theta = eta pi / 2; Euler at 0, re-noising at 1."""
    x0, eps, theta = x_t - t * velocity, x_t + (1 - t) * velocity, eta * math.pi / 2
    return (1 - s) * x0 + s * (math.cos(theta) * eps + math.sin(theta) * noise)


def transition_coefficient(t: float, s: float, *, eta: float) -> float:
    """G14: difference of two transitions with the same noise, per difference of velocities. Negative for s < t."""
    return s * math.cos(eta * math.pi / 2) * (1 - t) - (1 - s) * t


def martingale_residual(student: Gaussian, t: float, s: float, *, cosine: float) -> float:
    """G15: rms of E[x0(x_s) | x_t] - x0(x_t) for the exact denoiser, zero only at `matched_cosine`."""
    gain = (1 - s) * float(student.std) ** 2 / float(student.variance(s))
    # The eps prediction at x_t is t / V (x_t - a mu).
    eps_rms = t / math.sqrt(float(student.variance(t)))
    return gain * s * abs(cosine - matched_cosine(t, s)) * eps_rms


def matched_cosine(t: float, s: float) -> float:
    """G15: cos theta at which the transition's mean is that of the true reverse kernel."""
    return (1 - t) * s / ((1 - s) * t)


def hermite_grid(order: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Points [order^dimensions, dimensions] and weights summing to 1 for expectations over independent N(0, 1).

    Exact for polynomials of degree below 2 order in each variable.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    axis, mass = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    points = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    masses = torch.cartesian_prod(*[mass] * dimensions).view(-1, dimensions).prod(dim=1)
    return points, masses


def token_of(condition: Condition | None, x: Tensor) -> Tensor:
    """First element of the first token, [B, 1, ...]; zero without a condition."""
    if condition is None:
        return torch.zeros((), dtype=x.dtype)
    return condition.text[:, 0, 0].to(x.dtype).view(-1, *([1] * (x.ndim - 1)))


class GaussianDenoiser(nn.Module):
    """The exact denoiser of N(mean + token_gain token, std^2), called like `Denoiser`.

    With a token of zero as the null condition, guidance w gives the denoiser of mean + w token_gain token (G8).
    """

    def __init__(self, mean: float, std: float, *, token_gain: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std, self.token_gain = mean, std, token_gain

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        mean = self.mean + self.token_gain * token_of(condition, x_t)
        return Gaussian(mean, self.std).velocity(x_t, t.view(-1, *([1] * (x_t.ndim - 1))))

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return x_t - t.view(-1, *([1] * (x_t.ndim - 1))) * self(x_t, t, condition)


class LinearGaussianDenoiser(nn.Module):
    """Trainable affine map of x_t at each time, with (mean, log_std, token_gain) per entry of `times`.

    kind "posterior" is x0 = m + a s^2 / V (x_t - a m), the shape of an exact denoiser: a fake score. kind "transport"
    is x0 = m + s / sqrt(V) (x_t - a m), the shape of the optimal student, m + s x at t = 1. Each t uses the parameters
    of the nearest entry of `times`; the default has one set for all times, which is exact for every Gaussian.
    """

    def __init__(
        self,
        mean: float,
        std: float,
        *,
        kind: Literal["posterior", "transport"],
        token_gain: float = 0.0,
        times: Sequence[float] = (1.0,),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.kind, self.times = kind, tuple(times)
        self.mean = nn.Parameter(torch.full((len(self.times),), mean, dtype=dtype))
        self.log_std = nn.Parameter(torch.full((len(self.times),), math.log(std), dtype=dtype))
        self.token_gain = nn.Parameter(torch.full((len(self.times),), token_gain, dtype=dtype))

    def gaussian(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Gaussian:
        """The Gaussian of each sample, tensors [B, 1, ...]."""
        index = (t[:, None] - torch.tensor(self.times, dtype=t.dtype)).abs().argmin(dim=1)
        shape = (-1, *([1] * (x.ndim - 1)))
        mean, std, gain = (p[index].view(shape) for p in (self.mean, self.log_std.exp(), self.token_gain))
        return Gaussian(mean + gain * token_of(condition, x), std)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        data = self.gaussian(x_t, t, condition)
        t = t.view(-1, *([1] * (x_t.ndim - 1)))
        if self.kind == "posterior":
            return data.velocity(x_t, t)
        # (x_t - x0) / t with the factor t taken out of each term by hand, so that t = 0 is finite.
        a, root = 1 - t, torch.as_tensor(data.variance(t)).sqrt()
        slope = (t - (1 + a) * data.std**2) / (root * (root + data.std))
        return slope * x_t - data.mean * t / (root * (root + a * data.std))

    def x0(self, x_t: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return x_t - t.view(-1, *([1] * (x_t.ndim - 1))) * self(x_t, t, condition)
