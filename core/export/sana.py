"""SANA-Sprint students (arXiv:2503.09641) as stock SanaSprintPipeline with SCMScheduler.

That pipeline holds TrigFlow states of data with standard deviation 1/2, but around its network it divides by it and
changes to rectified flow: the network is called with the canonical x_t and t and gives the velocity, as ours. A step
from angle tau to tau' is x0 = f(x, tau), then cos(tau') x0 + sin(tau') z. In canonical coordinates that is the "sde"
step of `Student` from t to t' with t = sin / (sin + cos).

Of grids it knows: (first, middle) for two steps, and the angles first (1 - i / K) for other K. It takes `timesteps`,
but in diffusers 0.42 it does not hand the number of steps on with them, and the call fails.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from diffusers import SanaSprintPipeline, SCMScheduler
from torch import nn

from fewstep.core.families.sana import SanaFamily
from fewstep.core.teacher import Teacher

if TYPE_CHECKING:
    from fewstep.core.export.sampler import SamplerSpec

SIGMA_DATA = 0.5
FIRST_ANGLE = math.pi / 2
# The second angle of two steps: the pipeline's default and the paper's.
MIDDLE_ANGLE = 1.3
ANGLE_TOLERANCE = 1e-6


def sprint_times(steps: int) -> tuple[float, ...]:
    """Canonical times at which SanaSprintPipeline steps: the paper's angles for one and two steps, else linear ones.

    The paper's angles for four (atan 400, 1.3, 1.1, 0.6) are none that the pipeline takes.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    angles = (FIRST_ANGLE, MIDDLE_ANGLE) if steps == 2 else tuple(_linear_angles(FIRST_ANGLE, steps))
    return tuple(math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles)


def _linear_angles(first: float, steps: int) -> list[float]:
    return [first * (1 - i / steps) for i in range(steps)]


def sprint_angles(spec: SamplerSpec) -> tuple[float, float | None]:
    """(max_timesteps, intermediate_timesteps) for a call of SanaSprintPipeline that steps on this grid.

    Raises:
        ValueError: the pipeline has no such grid or sampler.
    """
    if spec.sampler != "sde" and spec.steps > 1:
        raise ValueError(f"SanaSprintPipeline adds fresh noise between steps, the sampler is {spec.sampler!r}: use sde")
    angles = [math.atan2(time, 1 - time) for time in spec.times]
    if spec.steps == 2:
        return angles[0], angles[1]
    linear = _linear_angles(angles[0], spec.steps)
    if max(abs(a - b) for a, b in zip(angles, linear, strict=True)) > ANGLE_TOLERANCE:
        raise ValueError(
            f"SanaSprintPipeline steps at the angles {linear} when it starts at the first of them, not at {angles}: "
            f"use sprint_times({spec.steps}), or two steps, whose second angle is free"
        )
    return angles[0], None


def is_sprint_network(network: nn.Module) -> bool:
    """Whether this is a SANA network with a guidance embedding, which only SanaSprintPipeline calls."""
    config: Any = getattr(network, "config", {})
    return type(network).__name__ == "SanaTransformer2DModel" and bool(config["guidance_embeds"])


def sprint_teacher(teacher: Teacher) -> Teacher:
    """The parts of a SANA teacher in a SanaSprintPipeline.

    Raises:
        ValueError: the teacher is of another family, or its network is not called at t in [0, 1].
    """
    family = teacher.family
    if not isinstance(family, SanaFamily):
        raise ValueError(f"a network with SANA's guidance embedding needs a SANA teacher, this one is {family.name}")
    if family.time_scale != 1:
        raise ValueError(
            f"SanaSprintPipeline calls its network at t in [0, 1], this teacher's sees {family.time_scale:g} t: "
            "fine-tune a teacher with dense time first (with_dense_time)"
        )
    parts: Any = teacher.pipeline
    pipeline = SanaSprintPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        transformer=parts.transformer,
        scheduler=SCMScheduler(sigma_data=SIGMA_DATA),  # pyright: ignore[reportArgumentType]
    )
    pipeline.set_progress_bar_config(disable=True)
    return Teacher(pipeline, path=teacher.path)
