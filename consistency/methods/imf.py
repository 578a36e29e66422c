"""Improved MeanFlow: the derivative runs along the model's own velocity, so the target is free of the network.

    V = u + (t - r) stop(du/dt)   along dx/dt = u(x, t, t), r fixed:   V is regressed to v~

Legend as in `meanflow.py`: B batch; states, velocities, u, derivative [B, ...]; t, r [B], r <= t. Arithmetic in fp32,
fp64 where an input is fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks
from fewstep.consistency.methods.flow_map import Guide, derivative_along, flow_batch, flow_record
from fewstep.consistency.methods.meanflow import meanflow_loss
from fewstep.consistency.sections import ImfConfig
from fewstep.consistency.times import TimePair
from fewstep.core.paths import at_least_fp32, expand_time
from fewstep.core.shapes import expand_weight, require_same_shape


def improved_prediction(prediction: Tensor, derivative: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """V = u + (t - r) stop(du/dt), which is regressed to a velocity: improved MeanFlow, as in its public code.

    The derivative runs along the model's own velocity u(x, t, t) (or that of an extra head) in place of eps - x0, so
    the target no longer depends on the network. Only `prediction` receives a gradient. Give V and the velocity to
    `meanflow_loss`.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(prediction=prediction, derivative=derivative)
    gap = expand_time(t, prediction) - expand_time(r, prediction)
    return at_least_fp32(prediction) + gap * at_least_fp32(derivative.detach())


@torch.no_grad()
def improved_guided_velocity(velocity: Tensor, conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """v + (1 - 1/w) (v_c - v_0): the target of improved MeanFlow at guidance w [B], an input of its network.

    Its fixed point is v_c = v_0 + w (v - v_0). v_c and v_0 are the model's own, with and without condition.

    Raises:
        ValueError: shapes differ, or scale is not [B].
    """
    require_same_shape(velocity=velocity, conditional=conditional, unconditional=unconditional)
    share = 1 - 1 / expand_weight(scale, velocity)
    return at_least_fp32(velocity) + share * (at_least_fp32(conditional) - at_least_fp32(unconditional))


def improved_guide(guidance: float) -> Guide:
    """Guides the velocity of the data by one scale.

    The paper draws a scale for each sample and gives it to its network by tokens; here it is fixed.
    """

    def guide(velocity: Tensor, conditional: Tensor, unconditional: Tensor, t: Tensor) -> Tensor:
        return improved_guided_velocity(velocity, conditional, unconditional, torch.full_like(t, guidance))

    return guide


def imf_step(data: DataBatch, pair: TimePair, networks: Networks, settings: ImfConfig) -> ConsistencyStep:
    """Improved MeanFlow on one batch: the model's own velocity, the derivative along it, and one call with graph.

    Raises:
        ValueError: some r exceeds its t.
    """
    batch = flow_batch(data, pair, networks, settings, guide=improved_guide(networks.guidance))
    t, r = pair.t, pair.r
    with torch.no_grad():
        direction = networks.student(batch.x_t, t, batch.condition)
    derivative = derivative_along(batch, networks, direction, settings)
    prediction = networks.wrapped(batch.x_t, t, batch.condition, r)
    improved = improved_prediction(prediction, derivative, t, r)
    found = meanflow_loss(improved, batch.velocity, power=settings.power, constant=settings.constant)
    return ConsistencyStep(found.loss, flow_record(found, pair, derivative))
