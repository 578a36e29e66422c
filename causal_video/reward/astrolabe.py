"""Astrolabe's regularisation (arXiv:2603.17051): a penalty on suspicious samples alone, and a reference that moves.

Its policy loss is `nft_loss` on x0 predictions, its advantages are centred in the group. Legend: P
prompts, K samples of each, A auxiliary rewards, B = P K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.dmd.reward.inputs import finite_values, reference_penalty


def rank_gap(primary: Tensor, auxiliary: Tensor) -> Tensor:
    """Rank by the primary reward minus the mean rank by the auxiliary ones, inside each prompt, [P, K].

    Ranks rise with the reward, from 0 to K - 1, ties share their mean. A large gap: the trained reward likes the
    sample more than the others do, as a hacked one. The released code sorts the other way round and ranks over the
    whole batch; this is the paper's text, with ranks per prompt (our reading).

    Args:
        primary: [P, K].
        auxiliary: [A, P, K].

    Raises:
        ValueError: the shapes do not fit, or a reward is not finite.
    """
    if primary.ndim != 2 or auxiliary.ndim != 3 or auxiliary.shape[1:] != primary.shape or len(auxiliary) == 0:
        raise ValueError(
            f"need primary [P, K] and auxiliary [A, P, K] rewards, A >= 1, got {tuple(primary.shape)} and "
            f"{tuple(auxiliary.shape)}"
        )
    finite_values(primary.flatten(), "primary rewards")
    finite_values(auxiliary.flatten(), "auxiliary rewards")
    return _ranks(primary) - _ranks(auxiliary).mean(dim=0)


def risky_samples(gap: Tensor, *, share: float) -> Tensor:
    """True where the gap exceeds the (1 - share)-quantile of the gaps that are not negative; same shape.

    Raises:
        ValueError: share is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    # Gaps sum to zero in each prompt, so at least one is not negative.
    threshold = torch.quantile(gap[gap >= 0], 1 - share)
    return gap > threshold


@dataclass(frozen=True)
class RiskShare:
    """The share of `risky_samples`, steered by how large the positive gaps are; a value, `updated` gives the next.

    Grows by a tenth when the mean positive gap exceeds all of the last `length`, falls by a tenth when it is below
    all of them, and stays in [lowest, highest] (constants of the released code). Raises ValueError for a share
    outside its bounds.
    """

    share: float = 0.1
    recent: tuple[float, ...] = ()
    lowest: float = 0.02
    highest: float = 0.2
    length: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.share <= self.highest <= 1:
            raise ValueError(
                f"need 0 < lowest <= share <= highest <= 1, got {self.lowest}, {self.share}, {self.highest}"
            )

    def updated(self, mean_positive_gap: float) -> RiskShare:
        """The value after an epoch with this mean over the gaps that are positive."""
        share = self.share
        if self.recent and mean_positive_gap > max(self.recent):
            share = min(share * 1.1, self.highest)
        elif self.recent and mean_positive_gap < min(self.recent):
            share = max(share * 0.9, self.lowest)
        recent = (*self.recent, mean_positive_gap)[-self.length :]
        return RiskShare(share, recent, self.lowest, self.highest, self.length)


def selective_penalty(prediction: Tensor, reference_prediction: Tensor, risky: Tensor) -> Tensor:
    """Mean of |prediction - reference|^2 over the risky samples, 0-dim; zero, with graph, where none is risky.

    Args:
        prediction: [B, ...], with graph.
        reference_prediction: [B, ...], gets no gradient.
        risky: [B], bool.

    Raises:
        ValueError: the shapes differ, or risky is not bool and [B].
    """
    if risky.dtype != torch.bool or risky.shape != prediction.shape[:1]:
        raise ValueError(f"risky must be bool [{prediction.shape[0]}], got {risky.dtype} {tuple(risky.shape)}")
    penalty = reference_penalty(prediction, reference_prediction)
    mask = risky.to(penalty.dtype)
    return (penalty * mask).sum() / mask.sum().clamp(min=1)


def reference_is_stale(
    penalty: float, epochs_since_reset: int, *, max_penalty: float = 0.15, max_epochs: int = 15
) -> bool:
    """Whether the reference is to be set to the policy: the penalty is too large, or it is too long ago.

    Raises:
        ValueError: a bound is not positive.
    """
    if max_penalty <= 0 or max_epochs < 1:
        raise ValueError(f"max_penalty and max_epochs must be positive, got {max_penalty} and {max_epochs}")
    return penalty > max_penalty or epochs_since_reset > max_epochs


def _ranks(rewards: Tensor) -> Tensor:
    below = rewards[..., None, :] < rewards[..., :, None]
    equal = rewards[..., None, :] == rewards[..., :, None]
    # The sample itself is among the equal ones.
    return below.double().sum(dim=-1) + (equal.double().sum(dim=-1) - 1) / 2
