"""DiffusionNFT and CRD in the loop: samples of an older policy, noised anew at the student's own times.

Legend: n samples of one slice; x0, x_t, velocities [n, C, h, w]; t [n].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.paths import add_noise, x0_from_velocity
from fewstep.core.randomness import Draw
from fewstep.dmd.reward.chain import Rollout, shared_draw
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.inputs import reference_penalty
from fewstep.dmd.reward.methods.crd import crd_loss, implicit_reward, reward_adaptive_penalty
from fewstep.dmd.reward.methods.nft import adaptive_nft_loss, nft_loss, optimality_probability
from fewstep.dmd.reward.setup import RewardSetup


@dataclass(frozen=True, eq=False)
class ForwardCall:
    """The noised samples x_t, their noise and time, and the velocities of the older policy and of the start there."""

    x_t: Tensor
    t: Tensor
    eps: Tensor
    old_velocity: Tensor
    reference_velocity: Tensor | None


@torch.no_grad()
def forward_call(config: RewardRunConfig, setup: RewardSetup, rollout: Rollout, *, draw: Draw) -> ForwardCall:
    """Noise the samples to one of the student's times each; with crd a group shares time and noise.

    The student is a jump at those times and nowhere else, so no other time is trained.
    """
    assert setup.old_role is not None
    own = shared_draw(rollout, draw) if config.method == "crd" else draw
    times = torch.tensor(setup.student.times, device=draw.device)
    t = times[(own.uniform("forward_time") * len(times)).long()]
    eps = own.noise(setup.latent_shape, "forward_noise")
    x_t = add_noise(rollout.x0, eps, t)
    old = setup.old_role.module(x_t, t, rollout.condition)
    reference = None if setup.reference is None else setup.reference(x_t, t, rollout.condition)
    return ForwardCall(x_t, t, eps, old, reference)


def forward_loss(
    config: RewardRunConfig, call: ForwardCall, velocity: Tensor, rollout: Rollout, advantages: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of nft or crd for the student's velocity at `call`, with its pull to the start."""
    forward = config.forward
    probability = optimality_probability(advantages, max_advantage=forward.max_advantage)
    target = call.eps - rollout.x0
    if config.method == "crd":
        implicit = implicit_reward(velocity, call.old_velocity, target, adaptive=forward.adaptive)
        group = rollout.groups.groups.to(velocity.device)
        loss = crd_loss(implicit, probability, group, crd_beta=forward.crd_beta, max_advantage=forward.max_advantage)
        record = {"policy_loss": loss.detach(), "implicit_reward_rms": implicit.detach().square().mean().sqrt()}
    else:
        x0, old_x0 = (x0_from_velocity(call.x_t, v, call.t) for v in (velocity, call.old_velocity))
        beta = forward.nft_beta
        if forward.adaptive:
            highest = forward.max_advantage
            loss = adaptive_nft_loss(x0, old_x0, rollout.x0, probability, nft_beta=beta, max_advantage=highest)
        else:
            loss = nft_loss(x0, old_x0, rollout.x0, probability, nft_beta=beta)
        record = {"policy_loss": loss.detach()}
    record["old_policy_distance"] = (velocity - call.old_velocity).detach().square().mean().sqrt()
    if forward.kl_weight == 0:
        return loss, record
    assert call.reference_velocity is not None
    penalty = reference_penalty(velocity, call.reference_velocity)
    if config.method == "crd":
        weights = {"kl_weight": forward.kl_weight, "lowest_weight": forward.lowest_kl_weight}
        pull = reward_adaptive_penalty(penalty, probability, **weights)
    else:
        pull = forward.kl_weight * penalty.mean()
    return loss + pull, {**record, "reference_penalty": penalty.mean().detach()}
