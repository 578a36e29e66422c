"""Flash-DMD (arXiv:2511.20549): losses routed by noise level, a fake score near the student, latent preferences.

Written after a summary of the paper with its equations; no code is public. Legend: B batch; x_win, x_lose, means [B,
...]; t [B]; P start states, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.core.paths import at_least_fp32
from fewstep.dmd.loss import require_same_shape
from fewstep.dmd.reward.flow_sde import Transition
from fewstep.dmd.reward.inputs import Reduction, finite_values, over_elements


def route_steps(times: Sequence[float], *, boundary: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(steps trained by distribution matching, steps trained by the discriminator): times >= boundary, and the others.

    Noisy steps decide layout, which matching is good at; late steps decide texture, which it smooths. Where the
    boundary lies is not in the source.

    Raises:
        ValueError: one of the two is empty.
    """
    high = tuple(i for i, t in enumerate(times) if t >= boundary)
    low = tuple(i for i, t in enumerate(times) if t < boundary)
    if not high or not low:
        raise ValueError(f"boundary {boundary} leaves one side of the times {tuple(times)} empty")
    return high, low


def routed_loss(matching: Tensor, adversarial: Tensor, t: Tensor, *, boundary: float, gan_weight: float) -> Tensor:
    """Mean over the batch of matching where t >= boundary and of gan_weight adversarial where not, 0-dim.

    Args:
        matching: [B] distribution matching loss of each sample's step.
        adversarial: [B] generator's adversarial loss of the same.
        t: [B] time at which the student was called.
        boundary: see `route_steps`.
        gan_weight: of the adversarial loss.

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(matching=matching, adversarial=adversarial, t=t)
    zero = torch.zeros_like(matching)
    # Selected before the sum: a nan on the side that is not asked for does not pass, its gradient is zero.
    high = torch.where(t >= boundary, matching, zero)
    return (high + gan_weight * torch.where(t >= boundary, zero, adversarial)).mean()


@torch.no_grad()
def inject_student(fake_weights: Iterable[Tensor], student_weights: Iterable[Tensor], *, decay: float) -> None:
    """fake <- decay fake + (1 - decay) student, in place, after each student update.

    Keeps the fake score close to a student that moves fast. It moves it off its own optimum, since a sampler is no
    denoiser, so compare scores only after the next update of the fake score. The paper's decay was not found.

    Raises:
        ValueError: decay is outside [0, 1], or the weights do not correspond.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}; 1 leaves the fake score alone")
    fakes, students = list(fake_weights), list(student_weights)
    if [w.shape for w in fakes] != [w.shape for w in students]:
        raise ValueError(
            f"fake score ({len(fakes)} tensors) and student ({len(students)}) do not have the same weights; "
            "inject adapters of the same rank, or whole networks"
        )
    for fake, student in zip(fakes, students, strict=True):
        fake.lerp_(student.to(fake), 1 - decay)


def best_and_worst(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [P] of the highest and of the lowest of K candidates from one state, scores [P, K].

    Raises:
        ValueError: a score is not finite, K < 2, or all candidates of a state score the same.
    """
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be [P, K] with K >= 2 candidates, got {tuple(scores.shape)}")
    finite_values(scores.flatten(), "scores")
    tied = (scores.amax(dim=1) == scores.amin(dim=1)).nonzero().flatten().tolist()
    if tied:
        raise ValueError(f"all candidates of states {tied} score the same, there is no pair; leave those states out")
    return scores.argmax(dim=1), scores.argmin(dim=1)


def preference_margin(
    x_win: Tensor, x_lose: Tensor, transition: Transition, reference_mean: Tensor, *, reduction: Reduction = "sum"
) -> Tensor:
    """[log p(win) - log p_ref(win)] - [the same of lose] of Gaussian transitions from one state, [B].

    Both policies have the std of `transition`, so the margin is (win - lose) (mean - reference) / std^2. The gradient
    reaches transition.mean alone.

    Raises:
        ValueError: the shapes differ, or the step is deterministic.
    """
    require_same_shape(x_win=x_win, x_lose=x_lose, mean=transition.mean, reference_mean=reference_mean)
    if not bool((transition.std > 0).all()):
        raise ValueError("a deterministic step (std 0) has no preference margin; draw pairs at earlier steps")
    moved = transition.mean - at_least_fp32(reference_mean.detach())
    apart = at_least_fp32(x_win.detach()) - at_least_fp32(x_lose.detach())
    return over_elements(apart * moved / transition.std.square(), reduction)


def preference_loss(margin: Tensor, *, dpo_beta: float, weight: Tensor | None = None) -> Tensor:
    """-mean weight log sigmoid(dpo_beta margin); log 2 at the reference (DPO, arXiv:2305.18290, Eq. 7, on transitions).

    For pairs of the reference that win with probability sigmoid(r_win - r_lose) the optimum is the transition tilted
    by e^{r / dpo_beta}. Pairs whose winner is certain (best against worst) have no optimum: the margin grows as long
    as one trains, and distillation in between is what holds it (the paper alternates 5 updates with 1 of matching).

    Args:
        margin: [B] of `preference_margin`.
        dpo_beta: scale of the margin, positive. Its value in the paper was not found.
        weight: [B], None is one.

    Raises:
        ValueError: a margin is not finite, or dpo_beta is not positive.
    """
    if dpo_beta <= 0:
        raise ValueError(f"dpo_beta must be positive, got {dpo_beta}")
    loss = -functional.logsigmoid(dpo_beta * finite_values(margin, "margins"))
    return loss.mean() if weight is None else (weight * loss).mean()
