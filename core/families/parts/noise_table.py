"""Networks that predict eps or v on a DDPM noise table, in canonical coordinates.

Legend: B batch, T length of the table. The state of the table's path is x = alpha x0 + sigma eps with
alpha^2 + sigma^2 = 1; the canonical state is x_t = x / (alpha + sigma) at t = sigma / (alpha + sigma).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from torch import Tensor

from fewstep.core.families.family import Family
from fewstep.core.grids import validate_grid
from fewstep.core.paths import VariancePreserving, expand_time, from_flow_state

# An fp32 t fixes the timestep to about 1e-4 near the noisy end; what lies this close to an integer was meant to be it.
INDEX_ROUNDING = 1e-3
# Stands for the zero at the end of a table with zero terminal SNR: alpha is 1e-8 there, which fp32 does not see beside
# the zero that stock DDIM and LCM compute with. (EulerDiscreteScheduler's own stand-in, 2^-24, is 2.4e-4 off.)
SMALLEST_ALPHAS_CUMPROD = 1e-16
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


@dataclass(frozen=True)
class TableFamily(Family):
    """A network on a noise table.

    The table may end at `last_time` < 1 (0.936 for Stable Diffusion), while a student starts at t = 1. Beyond the table
    the network gets the last timestep and an input of the norm that the path has at t, and its output is read with the
    table's last alpha and sigma: x0 = (x - sigma eps) / alpha, velocity = (x_t - x0) / t. At t = 1 this is the one-step
    rule of DMD2 (arXiv:2405.14867, Sec. 4): unit noise enters at the last timestep. At `last_time` it meets the exact
    conversion continuously. Before the table's first time only the timestep is clamped.

    Attributes:
        path: the noise table.
        prediction: what the network predicts: "epsilon" or "v_prediction" (v = alpha eps - sigma x0, arXiv:2202.00512).
        time_scale: length of the table.
    """

    path: VariancePreserving
    prediction: Literal["epsilon", "v_prediction"]
    time_scale: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_scale", float(len(self.path.alphas_cumprod)))

    @property
    def last_time(self) -> float:
        """The canonical time of the table's last entry."""
        return self.path.flow_time_range[1]

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state and the timestep [B] that the network is called with for a canonical state."""
        x, time = from_flow_state(self.path, x_t, t)
        return x, snap_to_integer(time)

    def velocity_of(self, output: Tensor, x_t: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The canonical velocity from the network's prediction at x; t is [B]."""
        last = self.last_time
        on_table = t.clamp(max=last)
        scale = self.path.scale_at_flow_time(on_table)
        alpha, sigma = expand_time((1 - on_table) * scale, x), expand_time(on_table * scale, x)
        if self.prediction == "epsilon":
            eps, x0 = output, (x - sigma * output) / alpha
        else:
            eps, x0 = sigma * x + alpha * output, alpha * x - sigma * output
        # The clamp keeps the branch that is not taken finite, and with it the gradient of torch.where.
        beyond = (x_t - x0) / expand_time(t.clamp(min=last), x)
        return torch.where(expand_time(t, x) <= last, eps - x0, beyond)

    def initial_state(self, noise: Tensor, t: float) -> Tensor:
        """noise / (alpha + sigma): the stock pipeline feeds unit noise at whichever timestep its grid starts."""
        time = torch.tensor([t], dtype=torch.float64)
        return noise / float(self.path.scale_at_flow_time(time))

    @property
    def last_timestep(self) -> float:
        """That of the noise table."""
        return len(self.path.alphas_cumprod) - 1

    def flow_time(self, timestep: Tensor) -> Tensor:
        """That of the noise table."""
        return self.path.to_flow_time(timestep)

    def teacher_grid(self, pipeline: Any, steps: int, shape: tuple[int, ...] | None = None) -> tuple[float, ...]:
        """Times of DDIM (arXiv:2010.02502) with the timestep spacing of the pipeline's scheduler.

        A deterministic DDIM step is an Euler step here: x_t = x0 + t (eps - x0) is affine in t for fixed x0 and eps.
        """
        scheduler = ddim_of(pipeline.scheduler)
        scheduler.set_timesteps(steps)
        times = tuple(self.path.to_flow_time(scheduler.timesteps.double()).tolist())
        validate_grid(times)
        return times


def snap_to_integer(time: Tensor) -> Tensor:
    """Timesteps within `INDEX_ROUNDING` of an integer as that integer; others as given, for the network takes both."""
    nearest = time.round()
    # The move to the integer is a constant: the derivative with respect to time goes through.
    return torch.where((time - nearest).abs() < INDEX_ROUNDING, time + (nearest - time).detach(), time)


def ddim_of(scheduler: Any) -> Any:
    """DDIM on the noise table of a scheduler of whatever class. CogVideoX shifts its table by a scale of its own."""
    kind: Any = CogVideoXDDIMScheduler if "snr_shift_scale" in scheduler.config else DDIMScheduler
    return kind.from_config(scheduler.config)


def noise_table(scheduler: Any) -> VariancePreserving:
    """The path of a scheduler's noise table, which does not depend on the scheduler's class."""
    return VariancePreserving(ddim_of(scheduler).alphas_cumprod.double().clamp(min=SMALLEST_ALPHAS_CUMPROD))


def require_table(scheduler: Any, model: str) -> None:
    """Raises ValueError for the config of a scheduler that walks no DDPM table, or samples a few-step student."""
    name = str(scheduler.get("_class_name"))
    if name.startswith("EDM") or "beta_schedule" not in scheduler:
        raise ValueError(f"the scheduler is a {name}, and {model} walks a DDPM table of betas: use another model")
    if name in FEW_STEP_SCHEDULERS:
        raise ValueError(
            f"the scheduler is a {name}, which samples a few-step student: use the model that it was distilled from"
        )
