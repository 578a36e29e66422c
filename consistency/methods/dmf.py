"""Decoupled MeanFlow: MeanFlow's target with a loss that limits outliers, for a network whose late blocks see r.

What makes the network is `core/two_time.py`. Legend as in `meanflow.py`.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep, DataBatch, Networks
from fewstep.consistency.methods.flow_map import derivative_along, flow_batch, flow_record, folded_guide
from fewstep.consistency.methods.meanflow import meanflow_target
from fewstep.consistency.sample_loss import (
    ConsistencyLoss,
    Reduction,
    consistency_difference,
    keep_samples,
    reduce_sample,
)
from fewstep.consistency.sections import DmfConfig
from fewstep.consistency.times import TimePair


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
    difference, usable = consistency_difference(prediction, target)
    error = reduce_sample(difference.square(), reduction)
    return ConsistencyLoss(keep_samples((error + constant).log(), usable).mean(), error.detach(), ~usable)


def dmf_step(data: DataBatch, pair: TimePair, networks: Networks, settings: DmfConfig) -> ConsistencyStep:
    """Decoupled MeanFlow on one batch: the derivative along v~ without graph, then one call of the student with it.

    Raises:
        ValueError: some r exceeds its t.
    """
    batch = flow_batch(data, pair, networks, settings, guide=folded_guide(networks.guidance, settings))
    derivative = derivative_along(batch, networks, batch.velocity, settings)
    prediction = networks.wrapped(batch.x_t, pair.t, batch.condition, pair.r)
    target = meanflow_target(batch.velocity, derivative, pair.t, pair.r)
    found = cauchy_loss(prediction, target, constant=settings.constant)
    return ConsistencyStep(found.loss, flow_record(found, pair, derivative))
