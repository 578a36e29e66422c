"""Matching a teacher that a reward tilts: the reward is read where the scores are compared (ours, beside RTDMD).

The reward's gradient on the sample itself (`direct`, RTDMD, arXiv:2605.26108) is held back by matching with a strength
that depends on the data: along a direction of variance S matching pulls with E[t^2 / ((1 - t)^2 S + t^2)], so that the
tilt is 1 / S times stronger along thin directions at large t. Here the teacher's prediction moves instead:

    x0 of the tilted teacher = x0 + lambda t^2 / (1 - t) d r(x0(x_t)) / d x_t.

For a Gaussian teacher and a linear reward that is the prediction of p e^(lambda r) itself, at every t and for every
variance, because d x0 / d x_t = (1 - t) Cov[x0 | x_t] / t^2. For a curved reward it is the first order in the tilt:
r of the mean in place of log E e^(lambda r). The price is a backward pass through teacher, decoder and scorers.

Legend: B samples; x_t, x0 [B, ...]; t [B] in (0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.paths import at_least_fp32
from fewstep.core.randomness import Draw
from fewstep.core.shapes import expand_weight, require_same_shape
from fewstep.core.teacher import Teacher
from fewstep.dmd.loss import direction_normaliser
from fewstep.dmd.matching import drawn_guidance
from fewstep.dmd.reward.chain import Loss, Rollout
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.matching import ComparedScores, require_matching
from fewstep.dmd.reward.scores import RewardModel
from fewstep.dmd.reward.sections import TiltedTeacherConfig
from fewstep.dmd.reward.setup import RewardSetup
from fewstep.evaluation.scorers.failure import RewardError


def tilted_teacher_loss(
    x0: Tensor, real_x0: Tensor, t: Tensor, reward_gradient: Tensor, *, tilt_scale: float
) -> Tensor:
    """What the tilt adds to `distribution_matching_loss`: zero, with the gradient -lambda t^2 / (1 - t) g / normaliser
    over the number of elements.

    The sum of both has the gradient of matching the tilted teacher, with the normaliser of the plain one.

    Args:
        x0: [B, ...] student sample, with graph.
        real_x0: [B, ...] the teacher's prediction at x_t.
        t: [B] in (0, 1).
        reward_gradient: [B, ...] g, that of r(x0(x_t)) with respect to x_t.
        tilt_scale: lambda, the factor of the reward in the exponent.

    Raises:
        ValueError: shapes differ, a time is not in (0, 1), or the gradient is not finite.
    """
    require_same_shape(x0=x0, real_x0=real_x0, reward_gradient=reward_gradient)
    t = at_least_fp32(t.detach())
    if not bool(((t > 0) & (t < 1)).all()):
        raise ValueError(f"times must lie in (0, 1), got {t.min().item():.4g} to {t.max().item():.4g}")
    if not bool(torch.isfinite(reward_gradient).all()):
        raise ValueError("the reward's gradient through the teacher is not finite")
    factor = tilt_scale * t.square() / (1 - t) / direction_normaliser(x0, real_x0)
    direction = -expand_weight(factor, x0) * at_least_fp32(reward_gradient.detach())
    x0 = at_least_fp32(x0)
    return ((x0 - x0.detach()) * direction).mean()


def reward_gradient(
    teacher: Teacher,
    reward: RewardModel,
    scores: ComparedScores,
    condition: Condition,
    *,
    prompts: list[str],
    guidance: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """d r(x0(x_t)) / d x_t [B, ...] of the teacher's guided prediction, and the rewards r [B]; no graph stays.

    The scores say where: x_t and t. `reward.chunk` samples at a time. Raises RewardError when a scorer fails.
    """
    size, gradients, rewards = reward.settings.chunk or len(prompts), [], []
    for start in range(0, len(prompts), size):
        rows = slice(start, start + size)
        of_rows = guidance[rows] if isinstance(guidance, Tensor) else guidance
        with torch.enable_grad():
            x_t = scores.x_t[rows].detach().requires_grad_()
            x0 = teacher.x0(x_t, scores.t[rows], condition.index(rows), of_rows)
            total = reward.followed_total(teacher.decode(x0), prompts[rows])
            gradients.append(torch.autograd.grad(total.sum(), x_t)[0])
        rewards.append(total.detach())
    return torch.cat(gradients), torch.cat(rewards)


def tilted_teacher_term(
    config: RewardRunConfig,
    setup: RewardSetup,
    settings: TiltedTeacherConfig,
    rollout: Rollout,
    scores: ComparedScores,
    *,
    draw: Draw,
) -> Loss:
    """`tilted_teacher_loss` where the scores were compared, and what to log.

    Raises RewardError when a scorer fails, or the gradient is not finite.
    """
    places = {"prompts": rollout.prompts, "guidance": drawn_guidance(require_matching(config), config.teacher, draw)}
    gradient, rewards = reward_gradient(setup.teacher, setup.reward, scores, rollout.condition, **places)
    try:
        loss = tilted_teacher_loss(scores.x0, scores.real_x0, scores.t, gradient, tilt_scale=settings.tilt_scale)
    except ValueError as error:
        raise RewardError(f"the tilted teacher cannot be matched ({error})", clean=False) from error
    return loss, {"tilted_teacher_reward": rewards.mean()}
