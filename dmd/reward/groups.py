"""Groups of samples that share a prompt, and the advantages that compare them with each other.

Sample numbers are those of a run (`Trainer.local_indices`): K neighbouring numbers are one group and draw one prompt.
So a group does not know how its step is cut into processes or micro-batches, and advantages are computed from the
rewards of the whole step, in its order: the same bits for any number of processes.

Shapes: N samples of a step, n of this process, G groups, R rewards; rewards [N] or [R, N], groups [N] integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.core.config import RunConfig
from fewstep.core.data import rows_of_samples
from fewstep.core.training.processes import Processes
from fewstep.core.training.trainer import Trainer

Scale = Literal["none", "leave_one_out", "group", "residual", "batch"]


FLOOR = 1e-4


@dataclass(frozen=True)
class SampleGroups:
    """Which group each sample belongs to [n] and the row of its prompt in the prompt list."""

    groups: Tensor
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Advantages:
    """Advantages [N] (float64), how many groups there are, and in how many of them nothing differs.

    A group without variance teaches nothing: its advantages are exactly 0. Log `zero_share`; close to 1 it means that
    the reward no longer tells samples of a prompt apart.
    """

    values: Tensor
    groups: int
    zero_groups: int

    @property
    def zero_share(self) -> float:
        return self.zero_groups / self.groups


def group_samples(samples: Sequence[int], group_size: int, *, prompts: int, seed: int) -> SampleGroups:
    """Group and prompt of sample numbers: numbers K g .. K g + K - 1 are group g, and the groups go through the prompts
    as single samples do (`rows_of_samples`: every epoch visits each prompt once).

    Raises ValueError when group_size is below 1; of 1 no sample has anything to be compared with.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; a group needs a sample of a prompt")
    numbers = [int(sample) // group_size for sample in samples]
    return SampleGroups(torch.tensor(numbers, dtype=torch.int64), tuple(rows_of_samples(numbers, prompts, seed)))


def require_group_size(group_size: int, batch_size: int) -> None:
    """Raises ValueError unless the batch of a step, over all processes, is a whole number of groups."""
    if group_size < 1 or batch_size % group_size:
        raise ValueError(
            f"group_size is {group_size} and batch_size {batch_size}; batch_size must be a multiple of group_size, "
            "which is at least 1"
        )


def require_whole_groups(group_size: int, run: RunConfig, trainer: Trainer) -> None:
    """Raises ValueError unless every slice of every process holds whole groups."""
    require_group_size(group_size, run.batch_size // (trainer.world_size * run.gradient_accumulation))


def gather_step(processes: Processes, local: Tensor) -> Tensor:
    """Values of the whole step [..., N] from those of each process [..., n], in the order of sample numbers."""
    rows = processes.rows(local.detach().cpu().contiguous())  # [processes, ..., n]
    return torch.cat(list(rows), dim=-1)


def group_advantages(rewards: Tensor, groups: Tensor, *, scale: Scale = "residual", floor: float = FLOOR) -> Advantages:
    """Rewards [N] minus the mean of their group, over a scale.

    - "none": the centred residual. Its policy gradient is short by the factor 1 - 1/K, since the mean contains the
      sample itself; "leave_one_out" subtracts the mean of the others, which removes that factor.
    - "group": divided by the group's standard deviation (DanceGRPO, arXiv:2505.07818). It erases how much a reward
      differs within a prompt.
    - "residual": divided by the standard deviation of all residuals of the step (MeanFlowAdvantage). A constant added
      to the rewards of one prompt changes nothing.
    - "batch": divided by the standard deviation of all rewards of the step, between prompts included, as the released
      code of Flow-GRPO (arXiv:2505.05470) does by default.

    Standard deviations are those of a population (divided by N); `floor` is added to them. Computed in float64.
    Raises ValueError when shapes disagree, a reward is not finite, a group has one sample, or the scale is unknown.
    """
    rewards = _checked(rewards[None], groups)[0]
    if scale not in get_args(Scale):
        raise ValueError(f"scale is {scale!r}; use one of {', '.join(get_args(Scale))}")
    _, member, count = groups.cpu().unique(return_inverse=True, return_counts=True)
    residual, constant = _residual(rewards, member, count)
    if scale == "leave_one_out":
        residual = residual * (count / (count - 1.0))[member]
    elif scale == "group":
        residual = residual / (_group_mean(residual.square(), member, count).sqrt()[member] + floor)
    elif scale == "residual":
        residual = residual / (residual.square().mean().sqrt() + floor)
    elif scale == "batch":
        residual = residual / (rewards.std(unbiased=False) + floor)
    return Advantages(residual, groups=len(count), zero_groups=int(constant.sum()))


def summed_advantages(
    rewards: Tensor, groups: Tensor, *, weights: Sequence[float], scale: Scale = "residual", floor: float = FLOOR
) -> Advantages:
    """Advantages of the weighted sum of rewards [R, N]: a reward on a larger scale outweighs the others."""
    total = (_checked(rewards, groups) * _weights(weights, len(rewards))).sum(dim=0)
    return group_advantages(total, groups, scale=scale, floor=floor)


def normalised_advantages(
    rewards: Tensor, groups: Tensor, *, weights: Sequence[float], scale: Scale = "group", floor: float = FLOOR
) -> Advantages:
    """GDPO (arXiv:2601.05242): each of the rewards [R, N] is normalised in its groups, then their weighted sum over the
    batch, to mean 0 and standard deviation 1. The scales of the rewards cancel, up to `floor`.

    A group counts as without variance when no reward differs in it. `scale` "batch" is the variant of RTDMD's released
    code. Raises ValueError as `group_advantages`, and unless there is one finite weight per reward.
    """
    checked = _checked(rewards, groups)
    parts = [group_advantages(row, groups, scale=scale, floor=floor).values for row in checked]
    total = (torch.stack(parts) * _weights(weights, len(rewards))).sum(dim=0)
    # The mean is 0 already, since every group's is; only rounding is left of it.
    spread = total.square().mean().sqrt()
    _, member, count = groups.cpu().unique(return_inverse=True, return_counts=True)
    constant = torch.stack([_residual(row, member, count)[1] for row in checked]).all(dim=0)
    return Advantages(total / (spread + floor), groups=len(count), zero_groups=int(constant.sum()))


def _checked(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards [R, N] in float64 on the CPU, where sums have one order."""
    if groups.ndim != 1 or groups.dtype.is_floating_point or rewards.ndim != 2 or rewards.shape[1] != len(groups):
        raise ValueError(
            f"rewards are {tuple(rewards.shape)} and groups {tuple(groups.shape)} {groups.dtype}; "
            "give one integer group per sample"
        )
    if rewards.numel() == 0:
        raise ValueError("there are no rewards; give at least one group")
    bad = ~torch.isfinite(rewards)
    if bool(bad.any()):
        raise ValueError(f"rewards of samples {bad.any(dim=0).nonzero()[:, 0].tolist()} are not finite")
    counts = groups.unique(return_counts=True)[1]
    if int(counts.min()) < 2:
        raise ValueError("a group has one sample; gather the rewards of all processes before comparing")
    return rewards.detach().double().cpu()


def _weights(weights: Sequence[float], count: int) -> Tensor:
    values = torch.tensor(list(weights), dtype=torch.float64)
    if len(values) != count or not bool(torch.isfinite(values).all()):
        raise ValueError(f"weights are {list(weights)} for {count} rewards; give one finite number each")
    return values[:, None]


def _group_mean(values: Tensor, member: Tensor, count: Tensor) -> Tensor:
    return torch.zeros(len(count), dtype=values.dtype).index_add_(0, member, values) / count


def _residual(rewards: Tensor, member: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus their group's mean [N], exactly 0 in groups where all are equal, and which groups [G] those are."""
    low, high = (
        torch.zeros(len(count), dtype=rewards.dtype).scatter_reduce(0, member, rewards, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    constant = low == high
    residual = rewards - _group_mean(rewards, member, count)[member]
    return residual.masked_fill(constant[member], 0.0), constant


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
