"""Advantages: closed forms, what must not change them, and that processes and slices do not."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.training.processes import Processes
from fewstep.dmd.reward.groups import (
    Scale,
    gather_step,
    group_advantages,
    group_samples,
    normalised_advantages,
    require_group_size,
    summed_advantages,
)

SCALES: list[Scale] = ["none", "leave_one_out", "group", "residual", "batch"]
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 16.0])


def local_part(step: Tensor, *, rank: int, world_size: int) -> Tensor:
    """The values [..., n] of the samples of one process from those of the whole step [..., N].

    Raises ValueError when the step does not divide by the processes.
    """
    if step.shape[-1] % world_size:
        raise ValueError(f"a step of {step.shape[-1]} samples does not divide by {world_size} processes")
    local = step.shape[-1] // world_size
    return step[..., rank * local : (rank + 1) * local]


def test_closed_forms() -> None:
    centred = torch.tensor([-1.0, 0.0, 1.0, -2.0, -2.0, 4.0], dtype=torch.float64)
    assert torch.equal(group_advantages(REWARDS, GROUPS, scale="none").values, centred)
    assert torch.equal(group_advantages(REWARDS, GROUPS, scale="leave_one_out").values, centred * 1.5)
    spread = torch.tensor([(2.0 / 3.0) ** 0.5] * 3 + [8.0**0.5] * 3, dtype=torch.float64)
    found = group_advantages(REWARDS, GROUPS, scale="group", floor=0.0).values
    assert (found - centred / spread).abs().max() < 1e-14
    found = group_advantages(REWARDS, GROUPS, scale="residual", floor=0.0).values
    assert (found - centred / (26.0 / 6.0) ** 0.5).abs().max() < 1e-14
    found = group_advantages(REWARDS, GROUPS, scale="batch", floor=0.5).values
    assert (found - centred / (REWARDS.double().std(unbiased=False) + 0.5)).abs().max() < 1e-14


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_are_counted_and_exactly_zero(scale) -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0], dtype=torch.float64)
    found = group_advantages(rewards, GROUPS, scale=scale)
    assert found.values[:3].tolist() == [0.0, 0.0, 0.0]
    assert (found.groups, found.zero_groups, found.zero_share) == (2, 1, 0.5)
    assert found.values[3] < 0.0 < found.values[5]
    nothing = group_advantages(torch.full((6,), 0.7), GROUPS, scale=scale, floor=0.0 if scale in SCALES[:2] else 1e-4)
    assert nothing.values.abs().max() == 0.0
    assert nothing.zero_share == 1.0


steps = st.integers(2, 5).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.integers(1, 6).flatmap(
            lambda count: st.lists(st.floats(-50.0, 50.0, width=32), min_size=size * count, max_size=size * count)
        ),
    )
)


def groups_of(rewards: list[float], size: int) -> torch.Tensor:
    return torch.arange(len(rewards)) // size


@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from(SCALES), st.randoms(use_true_random=False))
def test_sums_are_zero_and_order_does_not_matter(step, scale, random) -> None:
    size, rewards = step
    values, groups = torch.tensor(rewards, dtype=torch.float64), groups_of(rewards, size)
    found = group_advantages(values, groups, scale=scale).values
    assert found.view(-1, size).sum(dim=1).abs().max() < 1e-9
    order = list(range(len(rewards)))
    random.shuffle(order)
    permuted = group_advantages(values[order], groups[order] + 7, scale=scale).values
    assert (permuted - found[order]).abs().max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from(SCALES[:4]), st.floats(-100.0, 100.0))
def test_a_constant_per_prompt_changes_nothing_but_the_batch_scale(step, scale, constant) -> None:
    size, rewards = step
    values, groups = torch.tensor(rewards, dtype=torch.float64), groups_of(rewards, size)
    shifted = values + constant * (groups == 0)
    found, expected = (group_advantages(value, groups, scale=scale).values for value in (shifted, values))
    assert (found - expected).abs().max() < 1e-7


def test_the_batch_scale_does_see_a_constant_per_prompt() -> None:
    shifted = REWARDS + 100.0 * (GROUPS == 1)
    found, expected = (group_advantages(value, GROUPS, scale="batch").values for value in (shifted, REWARDS))
    assert (found / expected)[0].item() == pytest.approx(
        ((REWARDS.double().std(unbiased=False) + 1e-4) / (shifted.double().std(unbiased=False) + 1e-4)).item()
    )
    assert (found / expected)[0] < 0.2


def test_the_scale_of_one_reward_counts_in_the_sum_alone() -> None:
    parts = torch.stack([REWARDS, torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, 1.0])])
    larger = parts * torch.tensor([10.0, 1.0])[:, None]
    weights = (1.0, 0.5)
    sums = [summed_advantages(part, GROUPS, weights=weights).values for part in (parts, larger)]
    assert (sums[0] - sums[1]).abs().max() > 0.2
    normal = [normalised_advantages(part, GROUPS, weights=weights, floor=0.0).values for part in (parts, larger)]
    assert (normal[0] - normal[1]).abs().max() < 1e-12
    assert normal[0].mean().abs() < 1e-12
    assert normal[0].std(unbiased=False).item() == pytest.approx(1.0, abs=1e-12)
    assert summed_advantages(parts, GROUPS, weights=weights, scale="none").values.tolist() == pytest.approx(
        [-0.5, -0.5, 1.0, -3.0, -0.5, 3.5]
    )


def test_a_group_has_no_variance_when_no_reward_differs_in_it() -> None:
    flat, one = torch.full((6,), 2.0), torch.tensor([0.0, 0.0, 1.0, 3.0, 3.0, 3.0])
    found = normalised_advantages(torch.stack([flat, one]), GROUPS, weights=(1.0, 1.0))
    assert (found.groups, found.zero_groups) == (2, 1)
    assert found.values[3:].abs().max() == 0.0
    assert found.values[2] > 1.0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(0, 3), st.integers(1, 9))
def test_processes_and_slices_do_not_matter(size, count, world, step, prompts) -> None:
    """Each process groups, scores and gathers its own samples; the advantages are bit for bit those of one process."""
    batch = size * count * world
    samples = list(range(step * batch, (step + 1) * batch))
    whole = group_samples(samples, size, prompts=prompts, seed=3)
    rewards = torch.rand(2, batch, generator=torch.Generator().manual_seed(batch + step))
    expected = normalised_advantages(rewards, whole.groups, weights=(1.0, 2.0)).values
    local = batch // world
    parts, gathered = [], []
    for rank in range(world):
        mine = samples[rank * local : (rank + 1) * local]
        halves = [
            group_samples(part, size, prompts=prompts, seed=3) for part in (mine[: local // 2], mine[local // 2 :])
        ]
        assert halves[0].rows + halves[1].rows == whole.rows[rank * local : (rank + 1) * local]
        gathered.append(torch.cat([halves[0].groups, halves[1].groups]))
    groups = torch.cat(gathered)
    assert torch.equal(groups, whole.groups)
    for rank in range(world):
        values = normalised_advantages(rewards, groups, weights=(1.0, 2.0)).values
        parts.append(local_part(values, rank=rank, world_size=world))
    assert torch.equal(torch.cat(parts), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 7), st.integers(0, 5))
def test_a_group_has_one_prompt_and_an_epoch_visits_every_prompt_once(size, prompts, epoch) -> None:
    start = epoch * prompts * size
    found = group_samples(range(start, start + prompts * size), size, prompts=prompts, seed=1)
    assert found.groups.tolist() == [epoch * prompts + place // size for place in range(prompts * size)]
    by_group = [set(found.rows[first : first + size]) for first in range(0, len(found.rows), size)]
    assert all(len(rows) == 1 for rows in by_group)
    assert sorted(found.rows) == [row for row in range(prompts) for _ in range(size)]


def test_one_process_gathers_itself() -> None:
    values = torch.rand(2, 6, requires_grad=True)
    gathered = gather_step(Processes(0, 1), values)
    assert torch.equal(gathered, values.detach())
    assert not gathered.requires_grad
    assert torch.equal(local_part(gathered, rank=0, world_size=1), gathered)
    with pytest.raises(ValueError, match="6 samples does not divide by 4"):
        local_part(gathered, rank=0, world_size=4)


def test_the_centred_gradient_is_short_by_one_over_k() -> None:
    """For a Gaussian policy N(mu, 1) and reward a x, E[A d log pi / d mu] is (1 - 1/K) a, and a with leave-one-out."""
    size, count, slope = 4, 60_000, 1.7
    noise = torch.randn(count * size, dtype=torch.float64)
    groups = torch.arange(count * size) // size
    wanted: list[tuple[Scale, float]] = [("none", 0.75 * slope), ("leave_one_out", slope)]
    for scale, expected in wanted:
        gradient = (group_advantages(slope * noise, groups, scale=scale).values * noise).mean()
        assert gradient.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("size", "batch"), [(3, 8), (0, 8), (16, 8)])
def test_a_group_size_that_does_not_divide_is_an_error(size, batch) -> None:
    with pytest.raises(ValueError, match=f"group_size is {size} and batch_size {batch}"):
        require_group_size(size, batch)
    require_group_size(4, 8)
    require_group_size(1, 8)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"rewards of samples \[1, 4\] are not finite"):
        group_advantages(torch.tensor([0.0, torch.nan, 1.0, 2.0, torch.inf, 3.0]), GROUPS)
    with pytest.raises(ValueError, match="a group has one sample"):
        group_advantages(torch.rand(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="one integer group per sample"):
        group_advantages(torch.rand(6), GROUPS.float())
    with pytest.raises(ValueError, match=r"rewards are \(1, 5\) and groups \(6,\)"):
        group_advantages(torch.rand(5), GROUPS)
    with pytest.raises(ValueError, match="scale is 'std'"):
        group_advantages(REWARDS, GROUPS, scale="std")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="for 1 rewards"):
        summed_advantages(REWARDS[None], GROUPS, weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="no rewards"):
        group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="group_size is 0"):
        group_samples([0], 0, prompts=2, seed=0)


def advantages_of_rank(rank: int, world: int, folder: str) -> None:
    """What a training process does: its own rewards, gathered, compared, and its own advantages kept."""
    torch.set_num_threads(1)
    where = f"file://{folder}/rendezvous-{world}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    processes = Processes(rank, world)
    local = 12 // world
    samples = range(24 + rank * local, 24 + (rank + 1) * local)
    mine = group_samples(samples, 4, prompts=5, seed=2)
    rewards = torch.tensor([[sample**0.5, (sample * 7) % 5] for sample in samples]).T
    step = gather_step(processes, rewards), gather_step(processes, mine.groups)
    values = normalised_advantages(*step, weights=(1.0, 0.3)).values
    found = local_part(values, rank=rank, world_size=world)
    save_file({"advantages": found.contiguous(), "groups": mine.groups}, Path(folder) / f"{world}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_real_processes_find_what_one_finds(tmp_path) -> None:
    """Groups of four straddle the border between the processes, which have six samples each."""
    samples = range(24, 36)
    groups = group_samples(samples, 4, prompts=5, seed=2).groups
    rewards = torch.tensor([[sample**0.5, (sample * 7) % 5] for sample in samples]).T
    expected = normalised_advantages(rewards, groups, weights=(1.0, 0.3)).values
    torch.multiprocessing.spawn(advantages_of_rank, args=(2, str(tmp_path)), nprocs=2)
    parts = [load_file(tmp_path / f"2-{rank}.safetensors") for rank in range(2)]
    assert torch.equal(torch.cat([part["groups"] for part in parts]), groups)
    assert torch.equal(torch.cat([part["advantages"] for part in parts]), expected)
