"""Clipped policy gradients on the stochastic steps of a chain, and training on a subset of the steps.

Legend: B samples; log ratios, advantages [B]. Advantages are made elsewhere, from complete groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.randomness import sample_noise
from fewstep.dmd.reward.inputs import finite_values


@dataclass(frozen=True, eq=False)
class ClippedSurrogate:
    """The policy loss (0-dim, with graph) and what it says about the step (0-dim, without).

    Attributes:
        loss: mean max(-A q, -A clip(q)).
        clipped_share: share of samples whose gradient the clip removed. Above 0.01 at the first update after a rollout,
            the log-probabilities of rollout and training do not agree (dtype, guidance, dropout).
        ratio_deviation: mean |q - 1|.
    """

    loss: Tensor
    clipped_share: Tensor
    ratio_deviation: Tensor


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, *, clip_range: float, advantage_clip: float = 5.0
) -> ClippedSurrogate:
    """mean max(-A q, -A clip(q, 1 - c, 1 + c)), q = exp(log_ratio) (PPO, arXiv:1707.06347, Eq. 7).

    At q = 1 the gradient is -mean A grad log pi. The clip keeps a step near the policy that made the samples, which
    also lets one rollout serve several updates: q is their importance weight.

    Args:
        log_ratio: [B], log pi - log pi_old of the stored transition, with graph; or a guarded ratio.
        advantages: [B], without graph.
        clip_range: c > 0. Flow-GRPO 1e-4, RTDMD 1e-5, both for log-probabilities averaged over elements.
        advantage_clip: advantages are clamped to plus or minus this.

    Raises:
        ValueError: an advantage is not finite, the shapes differ, or a range is not positive.
    """
    if clip_range <= 0 or advantage_clip <= 0:
        raise ValueError(f"clip_range and advantage_clip must be positive, got {clip_range} and {advantage_clip}")
    if log_ratio.shape != advantages.shape:
        raise ValueError(
            f"one log ratio for each advantage is needed, got {tuple(log_ratio.shape)} and {tuple(advantages.shape)}"
        )
    advantage = finite_values(advantages.detach(), "advantages").clamp(-advantage_clip, advantage_clip)
    ratio = log_ratio.exp()
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return ClippedSurrogate(
        loss=torch.maximum(plain, clipped).mean(),
        clipped_share=(clipped > plain).to(ratio.dtype).mean().detach(),
        ratio_deviation=(ratio - 1).abs().mean().detach(),
    )


def select_steps(u: Tensor, *, first: int, count: int) -> tuple[int, ...]:
    """SubGRPO's steps of an epoch: `count` of first ... first + len(u) - 1, rising (RTDMD, arXiv:2605.26108).

    Args:
        u: [n] uniform numbers, one for each stochastic step, the same on all processes.
        first: number of the first stochastic step.
        count: how many steps get the policy loss.

    Raises:
        ValueError: count is not from 1 to n.
    """
    if u.ndim != 1 or not 1 <= count <= len(u):
        raise ValueError(f"count must be from 1 to the {u.numel()} stochastic steps, got {count}")
    return tuple(sorted(first + int(i) for i in u.argsort()[:count]))


def transition_noise(
    seed: int,
    sample_indices: Sequence[int],
    prompt_indices: Sequence[int],
    shape: tuple[int, ...],
    *,
    epoch: int,
    chain_step: int,
    selected: bool,
) -> Tensor:
    """Noise [B, *shape] of one stochastic step of a rollout (RTDMD, arXiv:2605.26108), fp32 on the CPU.

    On a step that is not `selected` all samples of a prompt share it, which takes that step's noise out of the
    comparison inside the group. The initial noise is never shared. It depends on the arguments alone, so every
    process draws the same for the same prompt.

    Raises:
        ValueError: there are not as many prompts as samples.
    """
    if len(sample_indices) != len(prompt_indices):
        raise ValueError(f"{len(sample_indices)} samples need as many prompts, got {len(prompt_indices)}")
    rows = sample_indices if selected else prompt_indices
    # Different streams: prompt 3 and sample 3 are different things.
    kind = "sample" if selected else "prompt"
    return sample_noise(seed, rows, shape, step=epoch, stream=f"transition_{chain_step}_{kind}")
