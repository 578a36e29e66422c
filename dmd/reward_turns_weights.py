"""Re-DMD and Stream-R1 in the loop: the rewards of a slice as weights of its matching loss.

Legend: n samples of one slice, R scorers; x0 [n, C, h, w].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.dmd.reward.weighting import rollout_weights, space_time_weight, weighted_matching_loss
from fewstep.dmd.reward_config import RewardRunConfig
from fewstep.dmd.reward_setup import RewardSetup
from fewstep.dmd.reward_turns_rollout import Rollout
from fewstep.dmd.reward_turns_scores import SliceRewards


def weighted_matching(
    config: RewardRunConfig,
    setup: RewardSetup,
    rollout: Rollout,
    rewards: SliceRewards,
    *,
    scores: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Matching weighted by exp(tilt_scale reward) per sample and, with `objective.saliency`, per element.

    Args:
        config: settings.
        setup: the parts of the run.
        rollout: the slice.
        rewards: of the slice; the mean weight over the whole step is 1.
        scores: x0 of the student (with graph), of the fake score and of the teacher.
    """
    objective = config.objective
    x0, fake_x0, real_x0 = scores
    weights = rollout_weights(
        rewards.total,
        tilt_scale=objective.tilt_scale,
        max_weight=objective.max_weight,
        population=rewards.population,
    )
    elements = element_weights(setup, rollout) if objective.saliency else None
    per_sample = weights.weight
    if elements is not None:
        loss = weighted_matching_loss(
            x0[:, :, None], fake_x0[:, :, None], real_x0[:, :, None], per_sample, element_weight=elements
        )
    else:
        loss = weighted_matching_loss(x0, fake_x0, real_x0, per_sample)
    return loss, {"effective_share": weights.effective_share, "clipped_weight_share": weights.clipped_share}


def element_weights(setup: RewardSetup, rollout: Rollout) -> Tensor:
    """Stream-R1's weights [n, 1, 1, h, w] of pictures, clips of one frame: where the rewards are sensitive.

    The saliency of a scorer is the channel mean of |d score / d pixel|, averaged over the pixels under each element.
    Its penalty for rewards that fall behind is one number for all samples of a step, which the division of weights by
    their mean takes out again, so it is left out.
    """
    with torch.enable_grad():
        pixels = setup.teacher.decode(rollout.x0).detach().requires_grad_()
        values = setup.reward.with_gradient(pixels, rollout.prompts)
        maps = [torch.autograd.grad(row.sum(), pixels, retain_graph=True)[0].abs().mean(dim=1) for row in values]
    size = (rollout.x0.shape[-2], rollout.x0.shape[-1])
    saliency = F.interpolate(torch.stack(maps, dim=1), size=size, mode="area")
    return space_time_weight(saliency[:, :, None], values.detach().T)
