"""The clipped surrogate, group centring and credit over a chain in closed form, SubGRPO's steps and noise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fewstep.dmd.reward.chain import clipped_surrogate, select_steps
from fewstep.dmd.reward.flow_sde import Transition, transition_log_prob
from fewstep.dmd.reward.inputs import group_mean, group_std, group_sum
from fewstep.dmd.reward.rollout import transition_noise
from tests.dmd.gaussian_bench import hermite_grid


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_on_policy_gradient_is_the_advantage_and_nothing_is_clipped() -> None:
    log_ratio = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    advantages = tensor(1.0, -2.0, 0.0, 7.0)
    result = clipped_surrogate(log_ratio, advantages, clip_range=1e-5)
    result.loss.backward()
    assert log_ratio.grad is not None
    # The last advantage is clamped to 5.
    assert log_ratio.grad.tolist() == pytest.approx([-0.25, 0.5, 0.0, -1.25])
    assert result.loss.item() == pytest.approx(-1.0)
    assert (float(result.clipped_share), float(result.ratio_deviation)) == (0.0, 0.0)


def test_clip_stops_only_what_moves_away_too_far() -> None:
    log_ratio = tensor(0.3, 0.3, -0.3, -0.3).requires_grad_()
    result = clipped_surrogate(log_ratio, tensor(1.0, -1.0, 1.0, -1.0), clip_range=0.2)
    result.loss.backward()
    assert log_ratio.grad is not None
    up, down = math.exp(0.3), math.exp(-0.3)
    assert log_ratio.grad.tolist() == pytest.approx([0.0, up / 4, -down / 4, 0.0])
    assert result.loss.item() == pytest.approx((-1.2 + up - down + 0.8) / 4)
    assert float(result.clipped_share) == 0.5


def test_zero_advantages_give_zero_gradient() -> None:
    log_ratio = tensor(0.1, -0.1).requires_grad_()
    clipped_surrogate(log_ratio, torch.zeros(2, dtype=torch.float64), clip_range=0.2).loss.backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_advantages_are_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"samples \[1\] are not finite"):
        clipped_surrogate(torch.zeros(3), torch.tensor([0.0, bad, 1.0]), clip_range=0.1)
    with pytest.raises(ValueError, match="one log ratio for each"):
        clipped_surrogate(torch.zeros(3), torch.zeros(2), clip_range=0.1)
    with pytest.raises(ValueError, match="must be positive"):
        clipped_surrogate(torch.zeros(3), torch.zeros(3), clip_range=0.0)


def score_gradients(x: Tensor, std: float) -> Tensor:
    """d log pi / d mean of each sample, through the code."""
    mean = torch.zeros(len(x), 1, dtype=torch.float64, requires_grad=True)
    transition_log_prob(x, Transition(mean, tensor(std))).sum().backward()
    assert mean.grad is not None
    return mean.grad[:, 0]


def test_group_centring_shrinks_the_gradient_by_one_over_k() -> None:
    # r = 1.5 x, two samples per group, exact expectation over both.
    points, weights = hermite_grid(6, 2)
    scores = [score_gradients(0.7 * points[:, i : i + 1], 0.7) for i in range(2)]
    rewards = 1.5 * 0.7 * points
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    gradient = sum((weights * centred[:, i] * scores[i]).sum() for i in range(2)) / 2
    assert float(gradient) == pytest.approx((1 - 1 / 2) * 1.5)


def test_division_by_the_std_erases_the_scale_of_the_reward() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    for slope in (0.1, -10.0):
        rewards = slope * 0.7 * z[:, 0]
        advantages = (rewards - rewards.mean()) / rewards.std()
        gradient = float((advantages * score_gradients(0.7 * z, 0.7)).mean())
        assert gradient == pytest.approx(math.copysign(1 / 0.7, slope), rel=0.01)


def test_every_step_of_a_chain_gets_its_own_credit() -> None:
    # x_{j+1} = alpha_j x_j + b_j + rho_j z_j, r = a x_3: E[A d log pi_j / d b_j] = a alpha_{j+1} ... alpha_2.
    alphas, stds, slope = (0.9, 0.6, 1.2), (0.5, 0.3, 0.8), 1.7
    noise, weights = hermite_grid(4, 3)
    x, scores = torch.zeros(len(noise), 1, dtype=torch.float64), []
    for j in range(3):
        mean = alphas[j] * x
        x = mean + stds[j] * noise[:, j : j + 1]
        scores.append(score_gradients(x - mean, stds[j]))
    for j, expected in enumerate((slope * 0.6 * 1.2, slope * 1.2, slope)):
        assert float((weights * slope * x[:, 0] * scores[j]).sum()) == pytest.approx(expected)


def test_inner_epochs_reuse_a_rollout_by_importance() -> None:
    # E_old[q grad log pi A] is the gradient at the new policy, not at the one that made the samples.
    points, weights = hermite_grid(30, 1)
    x = points
    mean = torch.full((len(x), 1), 0.3, dtype=torch.float64, requires_grad=True)
    policy, old = Transition(mean, tensor(1.0)), Transition(torch.zeros_like(x), tensor(1.0))
    log_ratio = transition_log_prob(x, policy) - transition_log_prob(x, old)
    advantages = weights * len(x) * x[:, 0] ** 2
    clipped_surrogate(log_ratio, advantages, clip_range=1e6, advantage_clip=1e6).loss.backward()
    assert mean.grad is not None
    # d/dm E_{N(m,1)} x^2 = 2 m.
    assert -float(mean.grad.sum()) == pytest.approx(0.6)


@given(st.integers(1, 8), st.integers(0, 4), st.randoms(use_true_random=False))
def test_selected_steps_are_distinct_and_in_range(n: int, first: int, random) -> None:
    u = torch.tensor([random.random() for _ in range(n)])
    count = random.randint(1, n)
    steps = select_steps(u, first=first, count=count)
    assert len(set(steps)) == count
    assert list(steps) == sorted(steps)
    assert first <= steps[0]
    assert steps[-1] < first + n


def test_selected_steps_follow_the_smallest_numbers() -> None:
    assert select_steps(torch.tensor([0.4, 0.9, 0.1]), first=1, count=2) == (1, 3)
    with pytest.raises(ValueError, match="from 1 to the 3"):
        select_steps(torch.tensor([0.4, 0.9, 0.1]), first=0, count=4)


def test_noise_is_shared_in_a_group_on_steps_that_are_not_trained() -> None:
    samples, prompts = [0, 1, 2, 3], [7, 7, 8, 8]
    shared = transition_noise(3, samples, prompts, (5,), epoch=2, chain_step=1, selected=False)
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[2], shared[3])
    assert float((shared[0] - shared[2]).abs().min()) > 0
    own = transition_noise(3, samples, prompts, (5,), epoch=2, chain_step=1, selected=True)
    assert float((own[0] - own[1]).abs().min()) > 0
    # Another process with the second half draws the same rows; other steps and epochs draw others.
    half = transition_noise(3, samples[2:], prompts[2:], (5,), epoch=2, chain_step=1, selected=False)
    assert torch.equal(half, shared[2:])
    for epoch, chain_step in ((3, 1), (2, 0)):
        other = transition_noise(3, samples, prompts, (5,), epoch=epoch, chain_step=chain_step, selected=False)
        assert float((other - shared).abs().min()) > 0
    with pytest.raises(ValueError, match="as many prompts"):
        transition_noise(3, samples, [1], (5,), epoch=0, chain_step=0, selected=False)


def sub_grpo_variance(slopes: tuple[float, ...], selected: int, group: int, draws: int) -> tuple[float, float]:
    """Mean and variance of the gradient of the selected step for R = sum a_j z_j; shared steps drop out by centring."""
    generator = torch.Generator().manual_seed(4)
    shape = (draws, group)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in slopes]
    noise = [z if j == selected else z[:, :1].expand(shape) for j, z in enumerate(noise)]
    rewards = torch.stack([a * z for a, z in zip(slopes, noise, strict=True)]).sum(dim=0)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    gradient = (centred * noise[selected]).mean(dim=1)
    return float(gradient.mean()), float(gradient.var())


def test_sub_grpo_takes_the_other_steps_out_of_the_variance() -> None:
    # One selected step: mean a (1 - 1/K), variance (K - 1) / K^2 (a^2 + a^2).
    mean, variance = sub_grpo_variance((2.0, 0.8, 3.0), selected=1, group=4, draws=200_000)
    assert mean == pytest.approx(0.8 * 0.75, rel=0.01)
    assert variance == pytest.approx(3 / 16 * 2 * 0.64, rel=0.02)


def test_group_statistics() -> None:
    values, group = tensor(1.0, 10.0, 3.0, 20.0, 5.0), torch.tensor([2, 0, 2, 0, 2])
    assert group_sum(values, group).tolist() == [9.0, 30.0, 9.0, 30.0, 9.0]
    assert group_mean(values, group).tolist() == [3.0, 15.0, 3.0, 15.0, 3.0]
    odd = math.sqrt(8 / 3)
    assert group_std(values, group).tolist() == pytest.approx([odd, 5.0, odd, 5.0, odd])
    with pytest.raises(ValueError, match="an integer for each"):
        group_mean(values, values)
