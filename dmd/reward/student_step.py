"""What a reward method is, and the student's loss by it on one slice of a run.

Legend: n samples of one slice; states, velocities [n, C, h, w]; t [n].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fewstep.core.condition import Condition
from fewstep.core.randomness import Draw
from fewstep.dmd.reward.chain import CallKey, Loss, Plan, PolicyCall, Prepared, RandomStep, Rollout
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import Needs, RewardSetup


class RewardMethod(Protocol):
    """A method of `methods/`, made of the settings of a run and the parts that its needs asked for."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None: ...

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        """What the setup has to build, beside what every run has."""
        ...

    @property
    def config(self) -> RewardRunConfig: ...

    @property
    def setup(self) -> RewardSetup: ...

    def plan(self, step: int) -> Plan:
        """What a step of the run does; a function of (seed, step), the same on all processes."""
        ...

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        """The step of a rollout after a call; `trained` says whether the plan gives it the policy loss."""
        ...

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        """Calls of snapshots, which are made while the reward is computed; `draw` is that of this update."""
        ...

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        """The states (x, t) that the loss asks the student for."""
        ...

    def loss(
        self,
        rollout: Rollout,
        prepared: Prepared,
        velocities: dict[CallKey, Tensor],
        rewards: SliceRewards | None,
    ) -> Loss:
        """The loss for the student's velocities at `calls`, and what to log; no rewards where nothing is scored."""
        ...


def joined_loss(method: RewardMethod, rollout: Rollout, prepared: Prepared, rewards: SliceRewards | None) -> Loss:
    """The student's loss on one slice and what to log of it, by one call of the (distributed) student."""
    calls = method.calls(rollout, prepared)
    states, times = torch.cat([x for x, _ in calls.values()]), torch.cat([t for _, t in calls.values()])
    condition = Condition.cat([rollout.condition] * len(calls))
    # One call for all states: a distributed network may be called only once before its backward pass.
    joined = method.setup.student_role.wrapped(states, times, condition).split(rollout.condition.batch_size)
    velocities = dict(zip(calls, joined, strict=True))
    loss, record = method.loss(rollout, prepared, velocities, rewards)
    return loss, {"student_loss": loss.detach(), **record}
