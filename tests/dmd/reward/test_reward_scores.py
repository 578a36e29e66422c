"""Rewards of a step: their normalisation, their comparison for any number of processes, and their failures."""

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from fewstep.core.training.processes import Processes
from fewstep.dmd.reward.config import RewardSettings, ScorerConfig
from fewstep.dmd.reward.scores import RewardModel, collect, compare, rewards_of_slice
from fewstep.embedded.digits.scorers import Slant, StrokeWeight
from fewstep.evaluation.scorers.failure import RewardError
from fewstep.evaluation.scorers.scorer import ScorerCard
from fewstep.evaluation.scorers.total import RewardParts

SETTINGS = RewardSettings(
    scorers=(
        ScorerConfig(name="stroke_weight", weight=2.0, mean=0.5, std=0.25),
        ScorerConfig(name="slant", weight=-1.0),
    ),
    group_size=3,
)


class OneOf(Processes):
    """A process among several whose rows are known: what `all_gather` would bring."""

    def __init__(self, rank: int, rows: Sequence[Tensor]) -> None:
        self.rank, self.world_size, self.known = rank, len(rows), rows

    def rows(self, tensor: Tensor) -> Tensor:
        assert torch.equal(tensor, self.known[self.rank])
        return torch.stack(list(self.known))


def test_rewards_are_normalised_and_weighed() -> None:
    pixels = torch.rand(6, 3, 8, 8)
    reward = RewardModel((StrokeWeight(), Slant()), SETTINGS, gradient=True)
    parts = reward.submit(pixels, ["a"] * 6)()
    values = reward.normalised(parts)
    torch.testing.assert_close(values[0], (pixels.flatten(1).mean(dim=1) - 0.5) / 0.25)
    torch.testing.assert_close(reward.total(values), 2 * values[0] - values[1])
    leaf = pixels.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.with_gradient(leaf, ["a"] * 6)[0].sum(), leaf)
    torch.testing.assert_close(gradient, torch.full_like(leaf, 4.0 / (3 * 64)))
    whole = reward.followed_total(leaf, ["a"] * 6)
    torch.testing.assert_close(whole, reward.total(values))
    followed = RewardModel((StrokeWeight(), Slant()), SETTINGS, gradient=True, followed=("slant",))
    alone = followed.followed_total(leaf, ["a"] * 6)
    torch.testing.assert_close(alone, -values[1])
    (slope,) = torch.autograd.grad(alone.sum(), leaf)
    torch.testing.assert_close(slope, torch.autograd.grad(-reward.with_gradient(leaf, ["a"] * 6)[1].sum(), leaf)[0])
    followed.close()
    reward.close()
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        reward.submit(pixels, ["a"] * 6)


@pytest.mark.parametrize("combination", ["sum", "gdpo"])
def test_comparison_does_not_know_the_processes(combination: Literal["sum", "gdpo"]) -> None:
    settings = RewardSettings(scorers=SETTINGS.scorers, group_size=3, combination=combination)
    reward = RewardModel((StrokeWeight(), Slant()), settings, gradient=False)
    generator = torch.Generator().manual_seed(0)
    values, process = torch.randn(2, 12, generator=generator), torch.randn(1, 12, generator=generator)
    groups = torch.arange(12) // 3
    whole = compare(reward, values, process, groups, processes=Processes(0, 1))
    halves = [torch.cat([values, process])[:, :6], torch.cat([values, process])[:, 6:]]
    for rank in (0, 1):
        part = compare(reward, halves[rank][:2], halves[rank][2:], groups, processes=OneOf(rank, halves))
        assert torch.equal(part.advantages.values, whole.advantages.values)
        assert torch.equal(part.process, whole.process)
    reward.close()
    assert whole.advantages.values.view(4, 3).sum(dim=1).abs().max() < 1e-12
    assert whole.process.view(4, 3).sum(dim=1).abs().max() < 1e-9
    assert whole.log(["a", "b"])["zero_share"] == 0.0
    second = rewards_of_slice(whole, 6, 3, device=torch.device("cpu"))
    assert second.advantages.dtype == torch.float32
    torch.testing.assert_close(second.total, whole.total[6:9])
    assert tuple(second.population.shape) == (12,)
    assert tuple(second.process.shape) == (1, 3)


def test_a_group_without_differences_teaches_nothing() -> None:
    reward = RewardModel((StrokeWeight(), Slant()), SETTINGS, gradient=False)
    values = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    values[:, :3] = 0.5
    groups = torch.arange(6) // 3
    found = compare(reward, values, values[:0], groups, processes=Processes(0, 1))
    reward.close()
    assert torch.equal(found.advantages.values[:3], torch.zeros(3, dtype=torch.float64))
    assert found.log(["a", "b"])["zero_share"] == 0.5
    assert tuple(found.process.shape) == (0, 6)


def test_a_failure_is_told_with_its_step() -> None:
    def broken() -> RewardParts:
        raise KeyError("no such token")

    with pytest.raises(RewardError, match=r"step 7: the reward failed \(KeyError: 'no such token'\)") as raised:
        collect([broken], Processes(0, 1), step=7)
    assert raised.value.clean

    class Elsewhere(Processes):
        def maximum(self, values: list[int]) -> list[int]:
            return [1]

    with pytest.raises(RewardError, match=r"step 7: the reward failed \(another process\)"):
        collect([], Elsewhere(0, 1), step=7)


def test_scorers_that_do_not_fit_are_refused() -> None:
    class Fixed:
        def __init__(self, card: ScorerCard) -> None:
            self.card = card

        def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
            return pixels.flatten(1).mean(dim=1)

    stubborn = (Fixed(ScorerCard("judge")), Slant())
    with pytest.raises(ValueError, match="follows the reward's own gradient, and judge has none"):
        RewardModel(stubborn, SETTINGS, gradient=True)
    assert RewardModel(stubborn, SETTINGS, gradient=False).weights == (2.0, -1.0)
    # The first entry of the settings is the one that has no gradient.
    assert RewardModel(stubborn, SETTINGS, gradient=True, followed=("slant",)).followed == (1,)
    with pytest.raises(ValueError, match=r"judge has none: choose another scorer, name others in direct\.scorers"):
        RewardModel(stubborn, SETTINGS, gradient=True, followed=("stroke_weight",))
    with pytest.raises(ValueError, match="a scorer of videos cannot judge pictures"):
        RewardModel((Fixed(ScorerCard("film", needs_video=True)), Slant()), SETTINGS, gradient=False)
