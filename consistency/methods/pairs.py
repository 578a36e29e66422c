"""Regression on pairs of noise and the teacher's sample: one call of the student gives the sample, and is compared.

A start for one-step students that another method goes on from (DMD2's for Stable Diffusion XL, arXiv:2405.14867, Sec.
5.2 and public code; knowledge distillation, arXiv:2101.02388). By itself it averages over what the teacher might make,
which a squared distance of latents shows as blur and LPIPS on pixels less (`core/networks/perceptual.py`). Legend: B
batch; x0 [B, C, ...].
"""

from __future__ import annotations

from torch import Tensor

from fewstep.consistency.batch import ConsistencyStep
from fewstep.core.networks.perceptual import Distance
from fewstep.core.paths import at_least_fp32
from fewstep.core.shapes import require_same_shape


def pairs_step(x0: Tensor, target: Tensor, distance: Distance) -> ConsistencyStep:
    """The mean distance of the student's samples x0, with graph, to the teacher's.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(x0=x0, target=target)
    errors = distance(at_least_fp32(x0), at_least_fp32(target.detach()))
    return ConsistencyStep(errors.mean(), {"pair_distance": errors.detach().mean()})
