"""Consistency and flow-map objectives in one dimension, where the answer is known.

A small network of (x, t, r) is trained against a teacher whose flow is known to any accuracy (`toy_mixture.Mixture`),
as in a distillation: first on the teacher's velocity, then on the objective. What it should become is the teacher's
consistency function (scm, dcm: r is 0) or its average velocity between any two times (the others).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from studies.toy_mixture import Mixture
from torch import Tensor, nn
from torch.nn import functional

from fewstep.consistency.methods.alphaflow import alpha_schedule, alphaflow_loss, alphaflow_state, alphaflow_target
from fewstep.consistency.methods.anyflow import anyflow_target, time_weight
from fewstep.consistency.methods.dcm import consistency_distillation_loss, teacher_step
from fewstep.consistency.methods.meanflow import meanflow_loss, meanflow_target
from fewstep.consistency.methods.scm import flow_tangent, normalise_tangent, scm_loss, trig_tangent
from fewstep.consistency.tangents import central_derivative, total_derivative
from fewstep.consistency.times import TimePair, anyflow_times, grid_times, logit_normal, mix_max_time, ordered_times
from fewstep.consistency.trigflow import to_trig_state, trig_from_velocity, trig_function
from fewstep.core.paths import add_noise, x0_from_velocity

ToyObjective = Literal["scm_trig", "scm_flow", "dcm", "meanflow", "alphaflow", "anyflow"]
OBJECTIVES: tuple[ToyObjective, ...] = get_args(ToyObjective)
CONSISTENCY = ("scm_trig", "scm_flow", "dcm")


@dataclass(frozen=True)
class ToySettings:
    """A run of the toy. The defaults reach an error below 0.03 on the mixtures of the tests."""

    objective: ToyObjective
    steps: int = 4000
    pretraining: int = 1000
    batch: int = 512
    width: int = 64
    learning_rate: float = 3e-3
    grid_steps: int = 256
    seed: int = 0


@dataclass(frozen=True)
class ToyErrors:
    """Mean and largest absolute error of where the student's map ends, in units of x."""

    mean: float
    largest: float


@dataclass(frozen=True, eq=False)
class ToyBatch:
    """Data and noise, and two normal and one uniform number for the times; everything [B]."""

    x0: Tensor
    eps: Tensor
    first: Tensor
    second: Tensor
    uniform: Tensor


class ToyNetwork(nn.Module):
    """(x, t, r) -> velocity, all [B]: three hidden layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.layers(torch.stack([x, 2 * t - 1, 2 * r - 1], dim=-1)).squeeze(-1)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """As a consistency network: r = 0."""
        return self(x, t, torch.zeros_like(t))


def train_toy(
    teacher: Mixture, settings: ToySettings, report: Callable[[int, float], None] | None = None
) -> ToyNetwork:
    """Train one student with Adam under a cosine schedule, in fp32 on the CPU; `report(step, loss)` sees each step."""
    generator = torch.Generator().manual_seed(settings.seed)
    network = ToyNetwork(settings.width)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else settings.width
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99))
    total = settings.pretraining + settings.steps
    for step in range(total):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))
        batch = _draw(teacher, settings.batch, generator)
        if step < settings.pretraining:
            loss = pretraining_loss(network, teacher, batch)
        else:
            progress = (step - settings.pretraining) / settings.steps
            loss = toy_loss(network, teacher, batch, settings, progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if report is not None:
            report(step, loss.item())
    return network


def pretraining_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch) -> Tensor:
    """Flow matching with the exact velocity, for every r: the student starts as its teacher."""
    t = _times(batch)
    x_t = add_noise(batch.x0, batch.eps, t)
    return functional.mse_loss(network(x_t, t, t * batch.uniform), teacher.velocity(x_t, t))


def toy_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch, settings: ToySettings, progress: float) -> Tensor:
    """The loss of one step of the objective; progress is the share of its training done.

    Raises:
        ValueError: the objective is unknown.
    """
    objective = settings.objective
    if objective == "scm_trig":
        return scm_trig_loss(network, teacher, batch)
    if objective == "scm_flow":
        return scm_flow_loss(network, teacher, batch)
    if objective == "dcm":
        return dcm_loss(network, teacher, batch, settings.grid_steps)
    pair = _pair(batch, objective)
    if objective == "meanflow":
        return mean_velocity_loss(network, teacher, batch, pair)
    if objective == "alphaflow":
        # The first half goes down to alpha = 0, the second is MeanFlow.
        alpha = alpha_schedule(min(1.0, 2 * progress))
        if alpha == 0:
            return mean_velocity_loss(network, teacher, batch, pair)
        return alpha_loss(network, teacher, batch, pair, alpha)
    if objective == "anyflow":
        return anyflow_loss(network, teacher, batch, pair)
    raise ValueError(f"objective {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")


def scm_trig_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch) -> Tensor:
    """sCM in TrigFlow."""
    t = _times(batch)
    x_t = add_noise(batch.x0, batch.eps, t)
    x_tau, tau = to_trig_state(x_t, t)
    target = trig_from_velocity(x_t, teacher.velocity(x_t, t), tau)
    pace = torch.cos(tau) * torch.sin(tau)
    derivative = total_derivative(trig_function(network.velocity), x_tau, tau, pace * target, pace).derivative
    output = trig_from_velocity(x_t, network.velocity(x_t, t), tau)
    tangent = trig_tangent(x_tau, output.detach(), target, derivative, tau).total
    return scm_loss(output, normalise_tangent(tangent)).loss


def scm_flow_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch) -> Tensor:
    """sCM in rectified flow."""
    t = _times(batch)
    x_t = add_noise(batch.x0, batch.eps, t)
    target = teacher.velocity(x_t, t)
    derivative = total_derivative(network.velocity, x_t, t, target, torch.ones_like(t)).derivative
    output = network.velocity(x_t, t)
    tangent = flow_tangent(output.detach(), target, derivative, t).total
    return scm_loss(output, normalise_tangent(tangent)).loss


def dcm_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch, grid_steps: int) -> Tensor:
    """dCM: one Euler step of the teacher on a grid that is denser near the data, where a mixture changes fastest.

    The weight makes the gradient with respect to the velocity that of `flow_tangent`, whatever the step and the time.
    """
    pair = grid_times(batch.uniform, steps=grid_steps, shift=0.5)
    x_t = add_noise(batch.x0, batch.eps, pair.t)
    x_r = teacher_step(x_t, teacher.velocity(x_t, pair.t), pair.t, pair.r)
    with torch.no_grad():
        target = x0_from_velocity(x_r, network.velocity(x_r, pair.r), pair.r)
    prediction = x0_from_velocity(x_t, network.velocity(x_t, pair.t), pair.t)
    return consistency_distillation_loss(prediction, target, weight=1 / (pair.t * (pair.t - pair.r))).loss


def mean_velocity_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch, pair: TimePair) -> Tensor:
    """MeanFlow with the teacher's velocity."""
    x_t = add_noise(batch.x0, batch.eps, pair.t)
    velocity = teacher.velocity(x_t, pair.t)
    tangents = (torch.ones_like(pair.t), torch.zeros_like(pair.r))
    derivative = total_derivative(network, x_t, (pair.t, pair.r), velocity, tangents).derivative
    target = meanflow_target(velocity, derivative, pair.t, pair.r)
    return meanflow_loss(network(x_t, pair.t, pair.r), target, power=0.5, constant=1e-3).loss


def alpha_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch, pair: TimePair, alpha: float) -> Tensor:
    """AlphaFlow with the teacher's velocity."""
    x_t = add_noise(batch.x0, batch.eps, pair.t)
    velocity = teacher.velocity(x_t, pair.t)
    x_s, s = alphaflow_state(x_t, velocity, pair.t, pair.r, alpha=alpha)
    with torch.no_grad():
        ahead = network(x_s, s, pair.r)
    target = alphaflow_target(velocity, ahead, alpha=alpha)
    return alphaflow_loss(network(x_t, pair.t, pair.r), target, alpha=alpha, constant=1e-2).loss


def anyflow_loss(network: ToyNetwork, teacher: Mixture, batch: ToyBatch, pair: TimePair) -> Tensor:
    """AnyFlow's first stage with central differences and its time weight, on the teacher's velocity.

    Without `match_scale`: a sample has one element here, and dividing its square by itself would turn the gradient into
    1 / residual, which does not settle.
    """
    x_t = add_noise(batch.x0, batch.eps, pair.t)
    velocity = teacher.velocity(x_t, pair.t)
    tangents = (torch.ones_like(pair.t), torch.zeros_like(pair.r))
    derivative = central_derivative(network, x_t, (pair.t, pair.r), velocity, tangents, step=5e-3, interval=(0.0, 1.0))
    target = anyflow_target(velocity, derivative, pair.t, pair.r)
    error = (network(x_t, pair.t, pair.r) - target).square()
    return (time_weight(pair.t) * error).mean()


@torch.no_grad()
def toy_errors(network: ToyNetwork, teacher: Mixture, *, consistency: bool) -> ToyErrors:
    """Errors of the map from t to r, over trajectories that start in [-2, 2] at t = 1 and times in [0.05, 1].

    consistency: r = 0 alone; otherwise every pair r < t of the times, 0 included.
    """
    times = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    start = torch.linspace(-2, 2, 17, dtype=torch.float64)
    # One integration per time gives the states of all trajectories there: rows times, columns trajectories.
    t, x = torch.meshgrid(times, start, indexing="ij")
    path = teacher.flow_map(x.flatten(), torch.ones_like(x.flatten()), t.flatten()).view_as(x)
    errors = []
    for i in range(1, len(times)):
        for j in range(1 if consistency else i):
            now, end = torch.full((len(start),), float(times[i])), torch.full((len(start),), float(times[j]))
            state = path[i].float()
            moved = state - (now - end) * network(state, now, end)
            errors.append((moved.double() - path[j]).abs())
    stacked = torch.stack(errors)
    return ToyErrors(stacked.mean().item(), stacked.max().item())


def run_toy(teacher: Mixture, settings: ToySettings) -> ToyErrors:
    """Train a student and measure it against what its objective should have taught it."""
    return toy_errors(train_toy(teacher, settings), teacher, consistency=settings.objective in CONSISTENCY)


def _draw(teacher: Mixture, batch: int, generator: torch.Generator) -> ToyBatch:
    uniform, component = torch.rand(2, batch, generator=generator)
    normal, eps, first, second = torch.randn(4, batch, generator=generator)
    return ToyBatch(teacher.sample(component, normal), eps, first, second, uniform)


def _times(batch: ToyBatch) -> Tensor:
    """Logit-normal times with a tenth at 1, where a one-step sampler starts."""
    return mix_max_time(logit_normal(batch.first, mean=0.0, std=1.6), torch.special.ndtr(batch.second), share=0.1)


def _pair(batch: ToyBatch, objective: ToyObjective) -> TimePair:
    first, second = torch.special.ndtr(batch.first), torch.special.ndtr(batch.second)
    if objective == "anyflow":
        return anyflow_times(first, second, torch.arange(len(first)), shift=2.0)
    pair = ordered_times(first, second, batch.uniform, equal_share=0.25)
    # A tenth starts at 1, a tenth (of all) ends at 0.
    t = torch.where(batch.uniform > 0.9, torch.ones_like(pair.t), pair.t)
    return TimePair(t, torch.where((batch.uniform > 0.8) & (batch.uniform < 0.95), torch.zeros_like(t), pair.r))
