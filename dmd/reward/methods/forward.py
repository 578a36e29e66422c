"""What DiffusionNFT and CRD share: samples of an older policy, noised anew at the student's own times.

Legend: n samples of one slice; x0, x_t, velocities [n, C, h, w]; t [n].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.paths import add_noise
from fewstep.core.randomness import Draw
from fewstep.dmd.reward.chain import CallKey, NoisedSamples, Prepared, Rollout, planned_calls
from fewstep.dmd.reward.setup import RewardSetup


@torch.no_grad()
def noise_samples(setup: RewardSetup, rollout: Rollout, draw: Draw) -> NoisedSamples:
    """The samples noised to one of the student's times each, with older policy and start called there.

    The student is a jump at those times and nowhere else, so no other time is trained.
    """
    times = torch.tensor(setup.student.times, device=draw.device)
    t = times[(draw.uniform("forward_time") * len(times)).long()]
    eps = draw.noise(setup.latent_shape, "forward_noise")
    x_t = add_noise(rollout.x0, eps, t)
    old = setup.snapshots["old_policy"].module(x_t, t, rollout.condition)
    reference = None if setup.reference is None else setup.reference(x_t, t, rollout.condition)
    return NoisedSamples(x_t, t, eps, old, reference)


def forward_calls(setup: RewardSetup, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
    """The states of matching, and the noised samples where there are rewards for them."""
    calls = planned_calls(setup, rollout)
    if prepared.noised is not None:
        calls["noised"] = (prepared.noised.x_t, prepared.noised.t)
    return calls
