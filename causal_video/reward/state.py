"""The state of Astrolabe's penalty from step to step, and the candidates that it applies to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.causal_video.reward.astrolabe import RiskShare, rank_gap, reference_is_stale, risky_samples
from fewstep.causal_video.reward.config import HIGHEST_SHARE, LOWEST_SHARE, CausalRewardConfig
from fewstep.dmd.reward.scores import StepRewards


@dataclass(frozen=True)
class PenaltyState:
    """A value: the share of candidates that are held back, and the age of the reference in steps."""

    risk: RiskShare
    reference_age: int = 0

    @classmethod
    def start(cls, config: CausalRewardConfig) -> PenaltyState:
        """That of the first step; a run without penalty carries it unread."""
        penalty = config.section.penalty
        share = LOWEST_SHARE if penalty is None else penalty.share
        return cls(RiskShare(share, lowest=LOWEST_SHARE, highest=HIGHEST_SHARE))

    def state(self) -> dict[str, Any]:
        """JSON data for `loaded`."""
        return {"share": self.risk.share, "recent": list(self.risk.recent), "reference_age": self.reference_age}

    @classmethod
    def loaded(cls, state: Mapping[str, Any]) -> PenaltyState:
        """What `state` gave."""
        recent = tuple(state["recent"])
        return cls(RiskShare(state["share"], recent, LOWEST_SHARE, HIGHEST_SHARE), state["reference_age"])

    def is_stale(self, config: CausalRewardConfig, penalty: float) -> bool:
        """Whether the reference is to become the student after one more step that measured this penalty."""
        bounds = config.section.penalty
        assert bounds is not None
        return reference_is_stale(
            penalty, self.reference_age + 1, max_penalty=bounds.max_penalty, max_epochs=bounds.max_steps
        )

    def after(self, mean_gap: float, *, reset: bool) -> PenaltyState:
        """The state after a step."""
        return PenaltyState(self.risk.updated(mean_gap), 0 if reset else self.reference_age + 1)


@dataclass(frozen=True, eq=False)
class Risk:
    """Which candidates of a step [N] are held back, and the mean of the gaps that are positive (0 if none is)."""

    risky: Tensor
    mean_gap: float


def judge_risk(config: CausalRewardConfig, rewards: StepRewards, state: PenaltyState) -> Risk:
    """Compare the ranks of primary and auxiliary rewards within each prompt (GARDO's rule in arXiv:2603.17051).

    A prompt's candidates are neighbours. Computed from the whole step, so every process finds the same.
    """
    names, size = [entry.name for entry in config.reward.scorers], config.reward.group_size
    penalty = config.section.penalty
    assert penalty is not None
    values = rewards.values.double().cpu()
    primary = rewards.total.double().cpu() if penalty.primary is None else values[names.index(penalty.primary)]
    auxiliary = values[[names.index(name) for name in penalty.auxiliary]]
    gap = rank_gap(primary.unflatten(0, (-1, size)), auxiliary.unflatten(1, (-1, size)))
    positive = gap[gap > 0]
    risky = risky_samples(gap, share=state.risk.share).flatten()
    return Risk(risky, positive.mean().item() if len(positive) else 0.0)


def no_risk(samples: int) -> Risk:
    """That of a run without penalty."""
    return Risk(torch.zeros(samples, dtype=torch.bool), 0.0)
