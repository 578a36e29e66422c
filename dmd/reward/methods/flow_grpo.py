"""Flow-GRPO (arXiv:2505.05470) on the student's own random steps: the clipped policy gradient of `chain`, with its KL.

The last step has no log-probability: it changes only through the weights that it shares with the others.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.core.randomness import Draw
from fewstep.dmd.reward.chain import (
    CallKey,
    Loss,
    Plan,
    PolicyCall,
    Prepared,
    RandomStep,
    Rollout,
    chain_plan,
    plain_step,
    planned_calls,
    policy_loss,
    scored_step,
)
from fewstep.dmd.reward.config import RewardRunConfig
from fewstep.dmd.reward.matching import matching_term
from fewstep.dmd.reward.scores import SliceRewards
from fewstep.dmd.reward.setup import Needs, RewardSetup


class FlowGrpo:
    """Flow-GRPO: advantages of the finished samples on every trained random step."""

    def __init__(self, config: RewardRunConfig, setup: RewardSetup) -> None:
        assert config.flow_grpo is not None
        self.config, self.setup, self.settings = config, setup, config.flow_grpo

    @staticmethod
    def needs(config: RewardRunConfig) -> Needs:
        assert config.flow_grpo is not None
        return Needs(reference=config.flow_grpo.kl_weight > 0)

    def plan(self, step: int) -> Plan:
        return chain_plan(self.config, self.settings, step, len(self.setup.student.times))

    def random_step(self, call: PolicyCall, noise: Tensor, *, trained: bool) -> RandomStep:
        times = self.setup.student.times
        if not trained:
            return plain_step(self.config, times, call, noise)
        return scored_step(self.config, self.settings, times, call, noise)

    def prepare(self, rollout: Rollout, draw: Draw) -> Prepared:
        return Prepared(draw)

    def calls(self, rollout: Rollout, prepared: Prepared) -> dict[CallKey, tuple[Tensor, Tensor]]:
        return planned_calls(self.setup, rollout)

    def loss(
        self, rollout: Rollout, prepared: Prepared, velocities: dict[CallKey, Tensor], rewards: SliceRewards | None
    ) -> Loss:
        matching, record = matching_term(self.config, self.setup, rollout, prepared, velocities)
        if rewards is None:
            return matching, record
        policy, found = policy_loss(self.config, self.setup, self.settings, rollout, velocities, rewards.advantages)
        return self.settings.policy_weight * policy + matching, {**found, **record}
