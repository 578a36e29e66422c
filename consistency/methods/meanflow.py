"""MeanFlow: networks u(x, t, r) of the average velocity from t down to r.

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

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks
from fewstep.consistency.methods.flow_map import FlowBatch, derivative_along, flow_batch, flow_record, folded_guide
from fewstep.consistency.sample_loss import ConsistencyLoss, consistency_difference, reduce_sample
from fewstep.consistency.sections import AlphaflowConfig, MeanflowLossConfig
from fewstep.consistency.times import TimePair
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
    return at_least_fp32(velocity) - (expand_time(t, velocity) - expand_time(r, velocity)) * at_least_fp32(derivative)


def meanflow_loss(prediction: Tensor, target: Tensor, *, power: float = 1.0, constant: float = 1e-2) -> ConsistencyLoss:
    """mean over the batch of weight |u - stop target|^2, the square summed over a sample.

    weight = stop(|u - target|^2 + c)^-p: with p = 1 every sample pulls with almost the same strength. The public code
    has p = 1, c = 0.01 for ImageNet and p = 0.75, c = 0.001 for CIFAR-10; both depend on the sum, so on the size of a
    sample. p = 0 is plain regression. With p > 0 and a random velocity the expected gradient at the true u is not
    exactly 0.

    Raises:
        ValueError: the shapes differ, or power or constant is negative.
    """
    difference, usable = consistency_difference(prediction, target)
    error = reduce_sample(difference.square(), "sum")
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


def meanflow_step(data: DataBatch, pair: TimePair, networks: Networks, settings: MeanflowLossConfig) -> ConsistencyStep:
    """MeanFlow on one batch: the derivative along v~ without graph, then one call of the student with it.

    Raises:
        ValueError: some r exceeds its t.
    """
    guide = folded_guide(networks.guidance, settings)
    return derivative_form(flow_batch(data, pair, networks, settings, guide=guide), networks, settings)


def derivative_form(
    batch: FlowBatch, networks: Networks, settings: MeanflowLossConfig | AlphaflowConfig
) -> ConsistencyStep:
    """The loss of MeanFlow, which is also that of AlphaFlow at the end of its schedule."""
    t, r = batch.pair.t, batch.pair.r
    derivative = derivative_along(batch, networks, batch.velocity, settings)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    target = meanflow_target(batch.velocity, derivative, t, r)
    found = meanflow_loss(prediction, target, power=settings.power, constant=settings.constant)
    return ConsistencyStep(found.loss, flow_record(found, batch.pair, derivative))
