"""Continuous-time consistency: the tangent in TrigFlow and in rectified flow, its normalisation, and the loss.

A consistency function is constant along the teacher's trajectory. Its derivative there, h, is what the student removes:
the loss moves the network towards its own detached output plus a positive multiple of h. The two coordinates state the
same condition, h_trig = sigma_data / Z^2 h_flow with Z of `trigflow.state_scale`; time law, weights and the constant of
the normaliser have to be tuned anew when one is exchanged for the other.

Legend: B batch; states, networks and tangents [B, ...]; tau, t [B]. `derivative` is total, along the teacher's
trajectory, as `tangents.total_derivative` gives it. Arithmetic in fp32, fp64 where an input is fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.consistency.batch import ConsistencyStep, Networks, Noised
from fewstep.consistency.sample_loss import ConsistencyLoss, Reduction, finite_samples, keep_samples, reduce_sample
from fewstep.consistency.sections import ContinuousConfig, ScmConfig
from fewstep.consistency.tangents import along
from fewstep.consistency.trigflow import to_trig_state, trig_from_velocity, trig_function
from fewstep.core.paths import at_least_fp32, expand_time
from fewstep.core.shapes import expand_weight, require_same_shape

Normaliser = Literal["none", "l2", "rms", "clip"]
Placement = Literal["drift", "state"]


@dataclass(frozen=True, eq=False)
class Tangent:
    """The direction g before its normalisation, in its two parts, each [B, ...] without graph.

    Attributes:
        gap: pulls the network's velocity to the teacher's.
        drift: carries the derivative of the network; the part that grows when a run becomes unstable.
    """

    gap: Tensor
    drift: Tensor

    @property
    def total(self) -> Tensor:
        """g = gap + drift."""
        return self.gap + self.drift


def tangent_warmup(step: int, steps: int) -> float:
    """min(1, step / steps), the factor r of the tangent; 1 for steps = 0 (arXiv:2410.11081, Alg. 1).

    Raises:
        ValueError: a number is negative.
    """
    if step < 0 or steps < 0:
        raise ValueError(f"step and steps must be 0 or more, got {step} and {steps}")
    return 1.0 if steps == 0 else min(1.0, step / steps)


@torch.no_grad()
def trig_tangent(
    x_tau: Tensor,
    network: Tensor,
    teacher: Tensor,
    derivative: Tensor,
    tau: Tensor,
    *,
    warmup: float = 1.0,
    sigma_data: float = 1.0,
    placement: Placement = "drift",
) -> Tangent:
    """g = cos df/dtau, with the factor cos that keeps every term finite up to pi/2 (arXiv:2410.11081, Alg. 1).

        drift: -cos^2 (sd F - sd F_T)                       - r (cos sin x + sd J)
        state: -cos sqrt(1 - r^2 sin^2) (sd F - sd F_T)     - (r cos sin x + sd J)

    "drift" is the sCM paper. "state" is how we read the public rCM code, whose r weighs the x term alone; the bracket
    in the paper is not clear to us. They agree at r = 1. The prior weight 1 / (sd tan) of sCM is already inside.

    Args:
        x_tau: [B, ...] TrigFlow state, not divided by sigma_data.
        network: F of the student at (x_tau, tau).
        teacher: F_T of the guided teacher there, or `trig_target` when there is no teacher.
        derivative: J = cos sin dF/dtau. Put cos sin into the tangents, which keeps them small:
            `total_derivative(F, x_tau, tau, cos sin sd F_T, cos sin)`.
        tau: [B] angle.
        warmup: r in [0, 1], see `tangent_warmup`.
        sigma_data: sd, the standard deviation of the data.
        placement: see above.

    Raises:
        ValueError: shapes differ, r is outside [0, 1], or the placement is unknown.
    """
    require_same_shape(x_tau=x_tau, network=network, teacher=teacher, derivative=derivative)
    _require_warmup(warmup)
    if placement not in ("drift", "state"):
        raise ValueError(f"placement {placement!r} is unknown; choose drift or state")
    angle = expand_time(tau, x_tau)
    cos, sin = torch.cos(angle), torch.sin(angle)
    gap = sigma_data * (at_least_fp32(network) - at_least_fp32(teacher))
    state, slope = cos * sin * at_least_fp32(x_tau), sigma_data * at_least_fp32(derivative)
    if placement == "drift":
        return Tangent(-cos.square() * gap, -warmup * (state + slope))
    return Tangent(-cos * (1 - warmup**2 * sin.square()).sqrt() * gap, -(warmup * state + slope))


@torch.no_grad()
def flow_tangent(network: Tensor, teacher: Tensor, derivative: Tensor, t: Tensor, *, warmup: float = 1.0) -> Tangent:
    """g = df/dt = -(v - v_T) - r t dv/dt for f = x_t - t v (Causal-rCM, arXiv:2606.25473).

    The form of the public code: r multiplies the derivative term, there is no term in x.

    Args:
        network: [B, ...] velocity of the student at (x_t, t).
        teacher: velocity of the guided teacher there, or eps - x0.
        derivative: dv/dt, `total_derivative(v, x_t, t, v_T, 1)`.
        t: [B] canonical time.
        warmup: r in [0, 1].

    Raises:
        ValueError: shapes differ, or r is outside [0, 1].
    """
    require_same_shape(network=network, teacher=teacher, derivative=derivative)
    _require_warmup(warmup)
    slope = warmup * expand_time(t, network) * at_least_fp32(derivative)
    return Tangent(at_least_fp32(teacher) - at_least_fp32(network), -slope)


@torch.no_grad()
def discrete_tangent(
    network: Tensor, before: Tensor, teacher: Tensor, t: Tensor, s: Tensor, *, warmup: float = 1.0
) -> Tangent:
    """g = (f(x_t, t) - f(x_s, s)) / (t - s) of f = x - t v, x_s one Euler step of the teacher from x_t, in two parts:

        -(v_s - v_T),    - r t (v_t - v_s) / (t - s)

    `flow_tangent` in the limit of a short step, and the direction of discrete consistency at any. Ours.

    Args:
        network: [B, ...] v_t, velocity of the student at (x_t, t).
        before: v_s, at (x_s, s).
        teacher: v_T, of the guided teacher at (x_t, t).
        t: [B] canonical time; likewise s below it.
        warmup: r in [0, 1].

    Raises:
        ValueError: shapes differ, r is outside [0, 1], or an s is not below its t.
    """
    require_same_shape(network=network, before=before, teacher=teacher)
    _require_warmup(warmup)
    if bool((s >= t).any()):
        raise ValueError(f"s {s.tolist()} must lie below t {t.tolist()}")
    step = expand_time(t - s, network)
    slope = (at_least_fp32(network) - at_least_fp32(before)) / step
    return Tangent(at_least_fp32(teacher) - at_least_fp32(before), -warmup * expand_time(t, network) * slope)


@torch.no_grad()
def normalise_tangent(tangent: Tensor, *, kind: Normaliser = "l2", constant: float = 0.1) -> Tensor:
    """The tangent at a bounded length, [B, ...]; norms run over all dimensions but the batch.

        none  g
        l2    g / (|g| + c)               length below 1; sCM (arXiv:2410.11081), rCM
        rms   g / (|g| / sqrt(D) + c)     root mean square below 1, so that c has a meaning per element
        clip  g cut to [-1, 1] elementwise, sCM's alternative; c is not used

    The rCM paper prints |g|^2 + c, its code has |g| + c as sCM does; this is the code. With c > 0 and a random
    velocity in place of a teacher's, the mean of the normalised tangent is biased.

    Raises:
        ValueError: the kind is unknown, or c is negative.
    """
    if constant < 0:
        raise ValueError(f"the constant must be 0 or more, got {constant}")
    tangent = at_least_fp32(tangent)
    if kind == "none":
        return tangent
    if kind == "clip":
        return tangent.clamp(-1, 1)
    if kind not in ("l2", "rms"):
        raise ValueError(f"normaliser {kind!r} is unknown; choose none, l2, rms or clip")
    flat = tangent.reshape(len(tangent), -1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    if kind == "rms":
        norm = norm / math.sqrt(flat.shape[1])
    return tangent / expand_weight(norm + constant, tangent)


def scm_loss(
    network: Tensor, tangent: Tensor, *, reduction: Reduction = "mean", log_weight: Tensor | None = None
) -> ConsistencyLoss:
    """mean over the batch of exp(w) |F - stop(F) - g|^2 - w (arXiv:2410.11081, Eq. 8 and Alg. 1).

    Since F equals stop(F), the value is that of |g|^2, near a constant once g is normalised; the gradient with respect
    to F is -2 exp(w) g / (B D) for "mean" and -2 exp(w) g / B for "sum". Only `network` and `log_weight` receive one.

    Args:
        network: [B, ...] output of the student with graph: F, or the velocity with `flow_tangent`.
        tangent: [B, ...] normalised g.
        reduction: over the D elements of a sample. The sCM paper divides by D, which its learned weight undoes; rCM
            sums (and multiplies by 100).
        log_weight: w [B] of a learned weight, a function of time; None is 0 without its term.

    A nan in the network itself may still reach shared weights, since 0 times its inner derivatives is nan.

    Raises:
        ValueError: shapes differ, or the reduction is unknown.
    """
    require_same_shape(network=network, tangent=tangent)
    network, tangent = at_least_fp32(network), at_least_fp32(tangent.detach())
    usable = finite_samples(network, tangent)
    # F - stop(F) is an exact zero that carries the graph; F - (F + g) would round g away.
    difference = keep_samples(network - network.detach() - tangent, usable)
    error = reduce_sample(difference.square(), reduction)
    weighted = error
    if log_weight is not None:
        log_weight = expand_weight(log_weight, error)
        weighted = torch.exp(log_weight) * error - torch.where(usable, log_weight, 0.0)
    return ConsistencyLoss(weighted.mean(), error.detach(), ~usable)


def _require_warmup(warmup: float) -> None:
    if not 0 <= warmup <= 1:
        raise ValueError(f"the warm-up factor must lie in [0, 1], got {warmup}; see tangent_warmup")


def scm_step(noised: Noised, networks: Networks, settings: ScmConfig) -> ConsistencyStep:
    """Continuous-time consistency (arXiv:2410.11081, Alg. 1): one tangent without graph, one forward with.

    What the tangent is compared with is the output of the gradient's own forward, so that a difference between the two
    calls cannot enter F - F. The tangent comes first: its memory is free again when the graph is built.
    """
    x_t, t = noised.x_t, noised.t
    target = networks.teacher_velocity(x_t, t, noised.condition)
    derivative = path_derivative(noised, networks.student, target, settings, settings.coordinates)
    velocity = networks.wrapped(x_t, t, noised.condition)
    if settings.coordinates == "trigflow":
        of = settings.warmup_of
        output, tangent = trig_direction(noised, velocity, target, derivative, settings, placement=of)
    else:
        output, tangent = flow_direction(noised, velocity, target, derivative, settings)
    log_weight = None if networks.time_weight is None else networks.time_weight(t)
    direction = normalise_tangent(tangent.total, constant=settings.normalizer)
    # A direction has a length of at most 1, whatever the size of the latents; a mean over them would divide the
    # gradient by their number, and Adam's eps would stop what is left.
    found = scm_loss(output, direction, reduction="sum", log_weight=log_weight)
    record = tangent_record(tangent, found)
    if log_weight is not None:
        record["log_weight"] = log_weight.detach().mean()
    return ConsistencyStep(found.loss, record)


def path_derivative(
    noised: Noised,
    student: nn.Module,
    teacher_velocity: Tensor,
    settings: ContinuousConfig,
    coordinates: Literal["trigflow", "rf"],
) -> Tensor:
    """The student's derivative along the teacher's path: cos sin dF/dtau in TrigFlow, dv/dt in rectified flow."""
    if coordinates == "rf":
        return along(
            lambda x, time: student(x, time, noised.condition),
            noised.x_t,
            noised.t,
            teacher_velocity,
            torch.ones_like(noised.t),
            settings,
        )
    x_tau, tau = to_trig_state(noised.x_t, noised.t)
    target = trig_from_velocity(noised.x_t, teacher_velocity, tau)
    function = trig_function(lambda x_t, t: student(x_t, t, noised.condition))
    pace = torch.cos(tau) * torch.sin(tau)
    if settings.tangent == "central":
        # The step of a difference is what it is; only forward mode gains by a small tangent.
        slope = along(function, x_tau, tau, target, torch.ones_like(tau), settings, end=math.pi / 2)
        return expand_time(pace, x_tau) * slope
    # cos sin inside the tangents keeps every number of the network's tangent small.
    return along(function, x_tau, tau, expand_time(pace, x_tau) * target, pace, settings, end=math.pi / 2)


def trig_direction(
    noised: Noised,
    velocity: Tensor,
    teacher_velocity: Tensor,
    derivative: Tensor,
    settings: ContinuousConfig,
    *,
    placement: Placement = "drift",
) -> tuple[Tensor, Tangent]:
    """(F with graph, its tangent) in TrigFlow's coordinates, from the `path_derivative` there."""
    x_tau, tau = to_trig_state(noised.x_t, noised.t)
    network = trig_from_velocity(noised.x_t, velocity, tau)
    target = trig_from_velocity(noised.x_t, teacher_velocity, tau)
    warmup = tangent_warmup(noised.step, settings.tangent_warmup)
    tangent = trig_tangent(x_tau, network.detach(), target, derivative, tau, warmup=warmup, placement=placement)
    return network, tangent


def flow_direction(
    noised: Noised, velocity: Tensor, teacher_velocity: Tensor, derivative: Tensor, settings: ContinuousConfig
) -> tuple[Tensor, Tangent]:
    """(velocity with graph, its tangent) in rectified flow's own coordinates, from the `path_derivative` there."""
    warmup = tangent_warmup(noised.step, settings.tangent_warmup)
    return velocity, flow_tangent(velocity.detach(), teacher_velocity, derivative, noised.t, warmup=warmup)


def tangent_record(tangent: Tangent, found: ConsistencyLoss) -> dict[str, Tensor]:
    """Lengths of the tangent and of its two parts, means over the batch, and how many samples were not finite."""
    lengths = {"tangent": tangent.total, "tangent_gap": tangent.gap, "tangent_drift": tangent.drift}
    record = {name: part.flatten(1).norm(dim=1).mean() for name, part in lengths.items()}
    return {**record, "isolated_samples": found.isolated_count.float()}
