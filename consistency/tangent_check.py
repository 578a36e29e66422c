"""What a run that rests on a derivative of its student checks before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.consistency.config import ConsistencyConfig, FlowMapSettings
from fewstep.consistency.setup import ConsistencySetup, takes_tangent
from fewstep.consistency.tangents import PathCheck, path_check
from fewstep.core.condition import Condition
from fewstep.core.config import require_one_method
from fewstep.core.denoiser import Denoiser
from fewstep.core.families.family import network_dtype
from fewstep.core.paths import add_noise
from fewstep.core.randomness import sample_noise
from fewstep.core.tangents.network import check_denoiser_jvp
from fewstep.core.training.trainer import Trainer

# Times and samples of the check: the middle of the path, and few samples.
CHECKED_TIMES = (0.3, 0.7)


def check_tangent(config: ConsistencyConfig, setup: ConsistencySetup, trainer: Trainer) -> str | None:
    """Compare the student's tangent with central differences; what was found, as text, or None where none is taken.

    Raises:
        ValueError: the tangent is not the derivative of the network.
    """
    if not takes_tangent(config) or config.tangent is None or not config.tangent.check_tangent:
        return None
    samples = list(range(len(CHECKED_TIMES)))
    _, x_t, condition = setup.real.rows(samples, trainer.device)
    t = torch.tensor(CHECKED_TIMES, device=trainer.device)
    r = t / 2 if isinstance(config.settings, FlowMapSettings) else None
    try:
        check = check_denoiser_jvp(setup.student.denoiser, x_t, t, condition, r=r)
        found = require_followed_path(config, setup, condition, samples)
    except ValueError as error:
        if network_dtype(setup.student.denoiser.network).itemsize >= torch.float32.itemsize:
            raise
        # FLUX and Qwen-Image round their time to the precision of their weights, a stair that has no differences; and
        # a difference over a short stretch of a path is not far above the rounding of its ends.
        raise ValueError(
            f"{error}\nHere the frozen weights under the adapters are in {config.teacher.dtype}. Where the network "
            "rounds its time to that, differences cannot judge it: start once with teacher.dtype float32 (--dry_run "
            "will do), where the check is sharp, and then with check_tangent false in the method's section"
        ) from error
    return (
        f"tangent against differences: off by {check.state.error:.1e} along x, {check.time.error:.1e} along t; "
        f"{found.words}"
    )


def require_followed_path(
    config: ConsistencyConfig, setup: ConsistencySetup, condition: Condition, samples: Sequence[int]
) -> PathCheck:
    """How well the student's derivative along the teacher's path is that of the path, over the times of the check.

    Raises ValueError where it follows a wiggle of the network.
    """
    _, x0, _ = setup.real.rows(samples, condition.device)
    t = torch.tensor(CHECKED_TIMES, device=x0.device)
    eps = sample_noise(config.run.seed, samples, tuple(x0.shape[1:]), stream="path_check", device=x0.device)
    x_t, student = add_noise(x0, eps, t), setup.student.denoiser
    direction = setup.teacher.velocity(x_t, t, condition, config.teacher.guidance)
    ends = (t,) if not isinstance(config.settings, FlowMapSettings) else (t, t / 2)

    def velocity(x: Tensor, time: Tensor, *end: Tensor) -> Tensor:
        # Without the autocast that a trainer puts around a call: its rounding is no wiggle.
        return Denoiser.forward(student, x, time, condition, *end)

    section = require_one_method(config)
    section = section if config.sana_sprint is None else f"{section}.consistency"
    return path_check(velocity, x_t, ends, direction).required(section)
