"""Score identity distillation."""

from __future__ import annotations

from torch import Tensor

from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import expand_weight, require_same_shape
from fewstep.dmd.loss import NORMALISER_FLOOR, direction_normaliser


def sid_loss(
    x0: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    *,
    alpha: float = 1.0,
    weight: Tensor | None = None,
    floor: float = NORMALISER_FLOOR,
) -> Tensor:
    """mean weight (real - fake) ((real - x0) - alpha (real - fake)) / normaliser (SiD, arXiv:2404.04057).

    Unlike DMD, nothing but the normaliser is cut from its graph: x_t, and with it both predictions, must depend on x0.
    The parameters of the two networks are frozen by the caller. With an exact fake score the expected value before the
    normaliser is (1 - alpha) |real - fake|^2, so the value says little: watch `matching_statistics`.

    Args:
        x0: [B, ...] student sample, with graph.
        fake_x0: [B, ...] prediction of the fake score at x_t, with the graph through x_t to x0.
        real_x0: [B, ...] prediction of the teacher at x_t, guided, with the graph through x_t to x0.
        alpha: 1 to 1.2. At 1 the expected loss is zero for an exact fake score; above 1 it rewards distance less than
            the identity does, which the authors prefer.
        weight: [B] factor of each sample, None is one.
        floor: smallest normaliser mean |x0 - real_x0|.

    Raises:
        ValueError: the shapes differ, or weight is not [B].
    """
    require_same_shape(x0=x0, fake_x0=fake_x0, real_x0=real_x0)
    normaliser = direction_normaliser(x0, real_x0, floor=floor)
    x0, fake_x0, real_x0 = at_least_fp32(x0), at_least_fp32(fake_x0), at_least_fp32(real_x0)
    difference = real_x0 - fake_x0
    product = difference * ((real_x0 - x0) - alpha * difference)
    loss = product.flatten(1).mean(dim=1) / normaliser
    return loss.mean() if weight is None else (expand_weight(weight, loss) * loss).mean()
