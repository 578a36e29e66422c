"""MeanFlow and its relatives: networks u(x, t, r) of the average velocity from t down to r.

    u = (x_t - x_r) / (t - r),   x_r = x_t - (t - r) u,   u(x, t, t) = v(x, t)
    u = v - (t - r) du/dt        along dx/dt = v, r fixed: the identity that is regressed

(MeanFlow, arXiv:2505.13447.) Tangents of (x, t, r) are (v, 1, 0), whatever encoding of the times the network
uses inside. Where r = t the loss is flow matching; the derivative may be skipped there.

Legend: B batch; states, velocities, u, derivative [B, ...]; t, r [B], r <= t. `velocity` is eps - x0 of one sample, or
a teacher's. Arithmetic in fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.consistency.batch import ConsistencyTurn, Networks
from fewstep.consistency.config import ConsistencyLossConfig
from fewstep.consistency.methods.flow_map import FlowBatch, derivative_along, flow_record
from fewstep.consistency.sample_loss import ConsistencyLoss, Reduction, finite_samples, keep_samples, reduce_sample
from fewstep.core.paths import at_least_fp32, expand_time
from fewstep.core.shapes import require_same_shape


@torch.no_grad()
def meanflow_target(velocity: Tensor, derivative: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """velocity - (t - r) du/dt, [B, ...] (arXiv:2505.13447).

    derivative is `total_derivative(u, x_t, (t, r), velocity, (1, 0))`, its x moving along the same velocity.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(velocity=velocity, derivative=derivative)
    return at_least_fp32(velocity) - _gap(t, r, velocity) * at_least_fp32(derivative)


def meanflow_loss(prediction: Tensor, target: Tensor, *, power: float = 1.0, constant: float = 1e-2) -> ConsistencyLoss:
    """mean over the batch of weight |u - stop target|^2, the square summed over a sample.

    weight = stop(|u - target|^2 + c)^-p: with p = 1 every sample pulls with almost the same strength. The public code
    has p = 1, c = 0.01 for ImageNet and p = 0.75, c = 0.001 for CIFAR-10; both depend on the sum, so on the size of a
    sample. p = 0 is plain regression. With p > 0 and a random velocity the expected gradient at the true u is not
    exactly 0.

    Raises:
        ValueError: the shapes differ, or power or constant is negative.
    """
    error, usable = _squared_error(prediction, target)
    weighted = adaptive_weight(error, power=power, constant=constant) * error
    return ConsistencyLoss(weighted.mean(), error.detach(), ~usable)


@torch.no_grad()
def adaptive_weight(error: Tensor, *, power: float = 1.0, constant: float = 1e-2) -> Tensor:
    """(error + c)^-p of squared errors [B], without graph (arXiv:2505.13447).

    Raises:
        ValueError: power or constant is negative.
    """
    if power < 0 or constant < 0:
        raise ValueError(f"power and constant must be 0 or more, got {power} and {constant}")
    return (at_least_fp32(error) + constant).pow(-power)


def improved_prediction(prediction: Tensor, derivative: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """V = u + (t - r) stop(du/dt), which is regressed to a velocity: improved MeanFlow, as in its public code.

    The derivative runs along the model's own velocity u(x, t, t) (or that of an extra head) in place of eps - x0, so
    the target no longer depends on the network. Only `prediction` receives a gradient. Give V and the velocity to
    `meanflow_loss`.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(prediction=prediction, derivative=derivative)
    return at_least_fp32(prediction) + _gap(t, r, prediction) * at_least_fp32(derivative.detach())


def random_guidance(uniform: Tensor, *, exponent: float = 1.0, low: float = 1.0, high: float = 8.0) -> Tensor:
    """Guidance scales with density proportional to w^-exponent on [low, high], from uniform numbers in [0, 1).

    Raises:
        ValueError: not 0 < low < high.
    """
    if not 0 < low < high:
        raise ValueError(f"need 0 < low < high, got {low} and {high}")
    uniform = at_least_fp32(uniform)
    if abs(exponent - 1) < 1e-6:
        return low * (high / low) ** uniform
    power = 1 - exponent
    return (low**power + uniform * (high**power - low**power)) ** (1 / power)


def cauchy_loss(
    prediction: Tensor, target: Tensor, *, constant: float = 1.0, reduction: Reduction = "mean"
) -> ConsistencyLoss:
    """mean over the batch of log(error + c): decoupled MeanFlow's loss, which limits what an outlier can pull.

    That the logarithm is taken per sample, of a mean over its elements, and the value of c are our reading.

    Raises:
        ValueError: shapes differ, the reduction is unknown, or c is not positive.
    """
    if not constant > 0:
        raise ValueError(f"the constant must be positive, got {constant}")
    error, usable = _squared_error(prediction, target, reduction)
    return ConsistencyLoss(keep_samples((error + constant).log(), usable).mean(), error.detach(), ~usable)


def _squared_error(prediction: Tensor, target: Tensor, reduction: Reduction = "sum") -> tuple[Tensor, Tensor]:
    """(error [B] with graph, usable [B]); samples that are not finite have error 0."""
    require_same_shape(prediction=prediction, target=target)
    prediction, target = at_least_fp32(prediction), at_least_fp32(target.detach())
    usable = finite_samples(prediction, target)
    return reduce_sample(keep_samples(prediction - target, usable).square(), reduction), usable


def _gap(t: Tensor, r: Tensor, x: Tensor) -> Tensor:
    return expand_time(t, x) - expand_time(r, x)


def meanflow_turn(batch: FlowBatch, networks: Networks, loss: ConsistencyLossConfig) -> ConsistencyTurn:
    """MeanFlow (arXiv:2505.13447); for 'imf' improved, for 'dmf' with the loss of decoupled MeanFlow.

    Improved MeanFlow's direction is the model's own velocity, and its V is regressed to v~.
    """
    t, r = batch.pair.t, batch.pair.r
    direction = batch.velocity
    if loss.objective == "imf":
        with torch.no_grad():
            direction = networks.student(batch.x_t, t, batch.condition)
    derivative = derivative_along(batch, networks, direction, loss)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    if loss.objective == "imf":
        improved = improved_prediction(prediction, derivative, t, r)
        found = meanflow_loss(improved, batch.velocity, power=loss.power, constant=loss.constant)
    else:
        target = meanflow_target(batch.velocity, derivative, t, r)
        if loss.objective == "dmf":
            found = cauchy_loss(prediction, target, constant=loss.constant)
        else:
            found = meanflow_loss(prediction, target, power=loss.power, constant=loss.constant)
    return ConsistencyTurn(found.loss, flow_record(found, batch.pair, derivative))
